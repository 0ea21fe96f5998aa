"""French: words and grammar of the testbed's generator."""

from __future__ import annotations

JOINER = " "

WORDS: dict[str, str] = {
    # masculine and feminine nouns that begin with a consonant and take "s" in the plural
    "NM": """
        livre jardin village chemin garçon marché médecin voisin soldat chanteur fermier professeur pont
        port train camion vélo moteur problème système projet plan dessin verre plat panier sac parapluie
        miroir meuble lit fauteuil crayon stylo cahier papier roman poème conte secret message billet timbre
        chat chien lapin mouton canard renard loup serpent papillon poisson requin dauphin boulanger facteur
        pompier gardien peintre notaire marchand pêcheur jardinier cousin frère père parent monde continent
        désert lac fleuve torrent rocher sommet sentier matin soir jour siècle moment débat conseil métier
        souvenir bruit silence rêve doute courage respect sourire regard geste visage doigt ventre tambour
        violon piano concert théâtre musée temple donjon grenier couloir légume citron melon raisin fromage
        beurre sucre biscuit champignon
    """,
    "NF": """
        maison rivière fille montagne ville route table chaise fenêtre porte lampe clé lettre page phrase
        question réponse raison leçon promesse guerre famille mère soeur cousine tante voisine reine
        chanteuse boulangère fermière danseuse bergère sorcière princesse vache chèvre poule baleine tortue
        grenouille mouche fourmi rose tulipe pomme poire cerise fraise tomate carotte salade soupe cuisine
        chambre cave cour tour place rue gare banque boutique ferme grange bibliothèque mairie machine
        voiture barque fusée roue corde planche brique pierre colline vallée plage forêt plaine grotte
        source cascade tempête neige pluie lumière couleur musique chanson danse fête surprise peur colère
        joie tristesse patience chance minute semaine saison nuit journée soirée bouteille tasse cuillère
        fourchette marmite bougie couverture veste robe chemise ceinture poche carte boussole frontière
        province région commune capitale langue lecture peinture sculpture
    """,
    # regular -er verbs that begin with a consonant: stem
    "V": """
        trouv cherch regard port donn montr gard lav laiss pos quitt rencontr demand racont prépar cach ferm
        coup cass répar dessin compt pouss roul plant récolt goût brûl chauff visit travers remont détest
        respect surveill guid salu remerci félicit critiqu conseill command livr transport charg vid mesur
        dépos ramass sépar tourn frapp touch toler modifi vérifi contrôl signal nomm présent refus réclam
        sauv recopi dict photographi film copi décor lou vendang pein
    """,
    "VI": """
        march chant dans parl travaill rest tomb arriv pleur trembl cri saut jou rêv hésit rentr pass murmur
        bavard dur résist brill flott gliss recul tard
    """,
    # adjectives that follow the noun; the feminine adds "e", the plural "s"
    "ADJ": """
        vert noir lourd étroit profond froid chaud brillant charmant important prudent patient violent lent
        content méchant savant vivant puissant élégant amusant fatigant étonnant brûlant courant distant
        français allemand lointain prochain humain voisin féminin matinal royal normal banal central fatal
        original poli hardi fini pourri bleu fatigué blessé cassé fermé caché oublié abandonné compliqué
        pressé rusé carré doré sacré usé ridé parfait fort court haut laid rond grand petit idiot adroit
        droit
    """,
    # adjectives that are the same in both genders
    "ADJE": """
        rouge jaune calme triste célèbre étrange simple difficile facile possible rapide solide fragile
        utile libre pauvre riche jeune vide propre sale large mince vaste sombre pâle tiède timide honnête
        sincère fidèle terrible horrible magnifique moderne antique rustique comique tragique bizarre
        sauvage
    """,
    "ADV": """
        souvent toujours jamais parfois lentement rapidement doucement vraiment presque encore déjà enfin
        bientôt rarement facilement seulement ensemble longtemps partout ailleurs volontiers tranquillement
        prudemment soudain discrètement clairement patiemment poliment tristement simplement
    """,
    "TIME": "hier demain maintenant ensuite alors puis autrefois désormais bientôt jadis",
    "UNIT": "jour mois semaine heure minute saison siècle",
    "LINK": "pourtant cependant donc ensuite finalement heureusement toutefois néanmoins certes bref",
    "DM": "le le le le un un ce mon son notre votre leur chaque quelque aucun",
    "DF": "la la la la une une cette ma sa notre votre leur chaque quelque aucune",
    "DP": "les les les des des ces mes ses nos vos leurs plusieurs quelques deux trois quatre cinq six sept",
    "PREP": "dans sur sous avec sans pour par vers devant derrière chez contre entre malgré depuis",
    "PRO": "il elle on je tu quelqu'un personne chacun",
    "PROP": "nous vous ils elles",
    "SAY": "dit pense croit sait affirme raconte espère répond explique",
    "MODAL": "peut doit veut sait va ose",
    "NUM": "deux trois quatre cinq six sept huit neuf dix onze douze quinze vingt trente quarante cent mille",
    "PROPER": """
        Brugnac Cassel Dourgne Ermont Fabrezan Gaillac Lunel Marcigny Nolay Ornans Puylaurens Ribérac
        Saumane Tréguier Uzerche Vézelay Clémence Mathieu Élodie Bastien Aurélie Thibault Noémie Quentin
        Solène
    """,
    "NA": """
        Mar Bel Cham Dou Fon Gué Lou Mont Neu Pier Roch Sau Tré Val Vau Cler Bris Cour Plé Gran Jou Ver Mé
        Bé Saint- La- Beau Char Font Haute Sou Lam
    """,
    "NB": """
        a é i ou on an en in eau er ail eu oi ille elle
    """,
    "NC": """
        gny ville court mont val lac nac bourg rac gnac treuil lieu fort mas ron sac vier zac ges tin nière
    """,
    "DIGIT": "1 2 3 4 5 6 7 8 9 0",
}

RULES: dict[str, tuple[str, ...]] = {
    "S": (
        "CL .",
        "CL .",
        "CL .",
        "CL .",
        "CL et CL .",
        "CL , mais CL .",
        "CL , car CL .",
        "CL ; CL .",
        "LINK , CL .",
        "WHEN , CL .",
        "SUBJ CL , CL .",
        "CL SUBJ CL .",
        "il y a NP PP .",
        "il y avait NPP PP .",
        "il est ADJE que CL .",
        "NP SAY que CL .",
        "est-ce que CL ?",
        "pourquoi NP V+e-t-il NP ?",
        "qui V+ait NP PP ?",
        "NAME SAY : «+CL+» .",
        "V+ez NP ADV !",
        "ni NP ni NP ne V+aient NP .",
        "non seulement CL , mais CL .",
        "voici NP et NP .",
    ),
    "SUBJ": ("quand", "parce que", "lorsque", "puisque", "tandis que", "comme", "si", "dès que", "pendant que"),
    "CL": (
        "NP V+e NP",
        "NP V+ait NP",
        "NPP V+ent NP",
        "NPP V+aient NP",
        "NP V+era NP PP",
        "NP VI+e PP",
        "NP VI+ait ADV",
        "NPP VI+ent PP",
        "PRO MODAL V+er NP",
        "PRO ne MODAL pas V+er NP",
        "PROP V+aient NPP ADV",
        "NPM est ADJM",
        "NPF est ADJF",
        "NPM était ADV ADJM",
        "NPF sera ADJF et ADJF",
        "NP a V+é NP",
        "PRO a ADV V+é NP",
        "NPM est V+é par NP",
        "NPF est V+ée par NP",
        "NP V+e NP en V+ant NP",
        "NP VI+e WHEN",
        "NP ne V+ait plus NP",
        "NPM est plus ADJM que NP",
        "NP commence à V+er NP",
        "NAME V+e NP puis VI+e",
        "NP et NP V+ent NPP",
    ),
    "ADJM": ("ADJ", "ADJ", "ADJE"),
    "ADJF": ("ADJ+e", "ADJ+e", "ADJE"),
    "NPM": ("DM NM", "DM NM", "DM NM ADJM", "DM NM ADJM", "DM NM de DF NF", "DM NM de NAME", "DM NM qui V+e DF NF"),
    "NPF": ("DF NF", "DF NF", "DF NF ADJF", "DF NF ADJF", "DF NF de DF NF", "DF NF de NAME", "DF NF qui V+e DM NM"),
    "NP": ("NPM", "NPM", "NPF", "NPF", "NAME", "NPM PREP DF NF", "NPF PREP DM NM"),
    "NPP": (
        "DP NM+s",
        "DP NF+s",
        "DP NM+s ADJ+s",
        "DP NF+s ADJ+es",
        "DP NF+s ADJE+s",
        "NUM NM+s",
        "NUM NF+s",
        "DP NM+s et DP NF+s",
    ),
    "PP": ("PREP DM NM", "PREP DF NF", "PREP DM NM ADJM", "PREP DF NF ADJF", "PREP NAME", "PREP DP NF+s", "à NAME"),
    "WHEN": ("TIME", "en YEAR", "chaque UNIT", "depuis NUM UNIT+s", "après NUM UNIT+s", "à DIGIT heures"),
    "YEAR": ("1+DIGIT+DIGIT+DIGIT", "19+DIGIT+DIGIT", "20+DIGIT+DIGIT"),
    "NAME": ("PROPER", "PROPER", "NA+NB", "NA+NC", "NA+NB+NC", "NA+NC NA+NB"),
}
