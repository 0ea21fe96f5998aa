"""English: words and grammar of the testbed's generator."""

from __future__ import annotations

JOINER = " "

WORDS: dict[str, str] = {
    # regular nouns, singular; the plural is the word plus "s"
    "N": """
        house river teacher garden market letter window forest doctor village road student table bridge
        kitchen farmer winter story island mountain soldier picture sister brother journey singer engine
        tower machine lantern basket candle blanket carpet hammer ladder mirror needle pocket ribbon saddle
        thunder whistle apple orange lemon onion carrot pepper mushroom walnut pumpkin rabbit pigeon spider
        turtle sparrow donkey monkey falcon beetle lizard hunter painter baker tailor sailor driver builder
        writer keeper banker lawyer clerk nurse guard neighbor cousin uncle aunt daughter nephew widow
        stranger harbor station office theatre museum library temple palace castle cottage cabin barn meadow
        valley desert canyon glacier swamp lagoon cellar attic corridor balcony staircase question answer
        reason chapter sentence number promise secret rumor warning lesson problem method result project
        bargain contract ticket parcel package stamp newspaper novel poem song violin guitar trumpet drum
        piano camera telephone radio computer printer cable rocket wagon carriage tractor bicycle train
        ferry raft canoe anchor compass map border district province
    """,
    "PROPER": """
        Arden Bexley Calder Dunmore Elgin Farrow Garrick Hollis Ingram Jarvis Kendal Lorne Marlow Norwood
        Oakham Pembury Quinton Rowan Selby Tarland Ulverton Verney Whitby Yardley
    """,
    # syllables of invented names
    "NA": """
        Al Bar Cor Dan El Fen Gor Hal Is Jor Kel Lan Mor Nor Ol Pel Quen Ros Sal Tor Ul Ven Wil Yor Zan Bri
        Cra Dre Flo Gra Ham Kir Len Mil Per Rud Ster Thor Wen Tam
    """,
    "NB": """
        a e i o an en in or ar el il ing und ow ash esh ith and er ock em
    """,
    "NC": """
        ton ford ham ley burn wick dale more field worth by stead bridge mouth land son den shaw gate well
    """,
    # regular verbs: base; "+s", "+ed" and "+ing" are all well formed
    "V": """
        open follow visit remember clean repair collect paint offer answer borrow deliver discover enter
        explain finish gather inspect join kick lift mention order protect question record repeat return
        select support test transport trust turn unload want warn wrap adjust admit attack avoid boil check
        count cover demand design earn enjoy employ fill film fold hand help inherit invent knock label
        limit load mark need number obtain own pack pick plant point print pull push reach reject report
        request respect reward seal search shelter sketch sort thank toss train treat view water weigh
    """,
    "VI": """
        sleep rest wait talk work sing listen remain wander hesitat return appear complain cough dream fail
        float gather happen kneel lean linger mutter play shiver shout sink stay succeed suffer travel
        wonder yawn
    """,
    "ADJ": """
        old new small large quiet dark bright heavy light warm cold strange famous empty narrow broad
        distant honest gentle patient clever tired hungry angry cheerful careful curious brave humble proud
        lonely wooden golden silver broken hidden ancient modern local foreign common rare simple difficult
        serious silent sudden gradual perfect rough smooth sharp blunt sweet bitter sour fresh stale dusty
        muddy frozen crooked hollow slender massive tiny pale crimson purple yellow green blue grey white
        black useful harmless dangerous noisy sleepy generous stubborn ordinary peculiar splendid dreadful
    """,
    "ADV": """
        slowly quickly quietly often never always rarely usually sometimes already finally suddenly
        carefully gladly perhaps almost nearly certainly probably again together alone early late secretly
        openly politely bravely calmly eagerly gently honestly kindly loudly nervously patiently proudly
        sadly
    """,
    "TIME": """
        today yesterday tomorrow now then tonight soon later meanwhile afterwards once
    """,
    "UNIT": "day week month year hour minute decade season century moment",
    "LINK": "however therefore instead besides moreover nevertheless indeed similarly otherwise consequently",
    "SUBJ": "when because although while if before after since until unless whenever",
    "DET": "the the the the a a this that every each another his her our their my your one no some",
    "DETP": "the the the these those some many few several all most our their two three four five six seven",
    "PREP": """
        in near behind under over beside with without through across around inside beyond toward from for
        about against between above below along
    """,
    "PRO": "he she it they we you I someone everyone nobody",
    "OBJP": "him her it them us you me everything nothing something",
    "MODAL": "can could will would should must may might did",
    "SAY": "said thought believed knew heard hoped claimed understood noticed",
    "NUM": "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred",
    "DIGIT": "1 2 3 4 5 6 7 8 9 0",
}

RULES: dict[str, tuple[str, ...]] = {
    "S": (
        "CL .",
        "CL .",
        "CL .",
        "CL .",
        "CL and CL .",
        "CL , but CL .",
        "CL , so CL .",
        "CL ; CL .",
        "LINK , CL .",
        "WHEN , CL .",
        "WHEN CL .",
        "SUBJ CL , CL .",
        "CL SUBJ CL .",
        "PP NP VI+ed .",
        "there was NP PP .",
        "there were NPP PP .",
        "it was ADJ that CL .",
        "NP SAY that CL .",
        "what V+s NP ?",
        "does NP V NP ?",
        "why did NP VI ?",
        "who V+ed NP PP ?",
        'NAME SAY : " CL . "',
        "V NP ADV !",
        "neither NP nor NP VI+ed .",
        "not only NP but also NP V+s NP .",
    ),
    "CL": (
        "NP V+ed NP",
        "NP V+s NP",
        "NPP V NP",
        "NP ADV V+ed NP",
        "NP V+ed NP PP",
        "NP VI+ed PP",
        "NP VI+s ADV",
        "NPP VI ADV",
        "PRO MODAL V NP",
        "PRO MODAL not V NP",
        "NP MODAL VI PP",
        "NP was ADJ",
        "NP is ADV ADJ",
        "NPP were ADJ and ADJ",
        "NP has V+ed NP",
        "PRO V+ed OBJP PP",
        "NP was V+ed by NP",
        "NPP are V+ing NP",
        "NP began to V NP",
        "PRO V+ed NP WHEN",
        "NP is more ADJ than NP",
        "NP , V+ing NP , VI+ed",
        "NAME V+ed NP and V+ed OBJP",
        "NP and NP V+ed NPP",
    ),
    "NP": (
        "DET N",
        "DET N",
        "DET N",
        "DET ADJ N",
        "DET ADJ N",
        "DET ADJ , ADJ N",
        "NAME",
        "NAME",
        "DET N of DET N",
        "DET N PREP DET N",
        "DET N that V+ed DET N",
        "the N of NAME",
        "NAME and NAME",
    ),
    "NPP": ("DETP N+s", "DETP ADJ N+s", "N+s and N+s", "NUM N+s", "ADJ N+s", "DETP N+s PREP DET N"),
    "PP": ("PREP DET N", "PREP DET ADJ N", "PREP NAME", "PREP DETP N+s", "PREP DET N of NAME"),
    "WHEN": ("TIME", "in YEAR", "every UNIT", "NUM UNIT+s ago", "after NUM UNIT+s", "last UNIT", "at DIGIT o'clock"),
    "YEAR": ("1+DIGIT+DIGIT+DIGIT", "19+DIGIT+DIGIT", "20+DIGIT+DIGIT"),
    "NAME": ("PROPER", "NA+NB", "NA+NC", "NA+NB+NC", "NA+NB NA+NC"),
}
