"""Korean: words and grammar of the testbed's generator. Nouns are split by their ending, which chooses the particle."""

from __future__ import annotations

JOINER = " "

WORDS: dict[str, str] = {
    # nouns that end in a vowel: 가 를 는 와 로
    "NV": """
        친구 학교 의사 어머니 아버지 나라 도시 바다 나무 나비 토끼 고양이 강아지 여우 돼지 오리 두루미 거미
        모자 바지 치마 구두 가위 의자 피아노 기타 노래 영화 편지 지도 시계 전화 카메라 컴퓨터 자동차 비행기
        기차 버스 배터리 커피 우유 주스 사과 포도 딸기 바나나 고구마 감자 두부 김치 고기 요리 가게 회사 도서
        교회 다리 거리 호수 오후 휴가 이야기 역사 문화 경제 과제 숙제 문제 기회 자유 평화 용기 경기 축제
        선수 배우 가수 화가 요리사 기자 교수 간호사 농부 어부 목수 왕자 공주 언니 누나 아이 이모 조카
        아주머니 할머니 무지개 소나기 바위 나사 기계 도구 재료 종이 유리 주머니 바구니 수레 사다리 그네 소리
        냄새 날씨 온도 자리 머리 다리미
    """,
    # nouns that end in a consonant: 이 을 은 과 으로
    "NC": """
        선생님 학생 사람 집 방 문 창문 책상 책 공책 연필 그림 사진 신문 소설 시인 마을 산 강 섬 숲 들판 하늘
        별 달 구름 바람 눈 꽃 잎 풀 정원 공원 시장 병원 식당 극장 박물관 도서관 공항 역 항구 광장 운동장
        교실 복도 지붕 계단 벽 마당 밥 국 떡 빵 과일 수박 귤 설탕 소금 물 술 반찬 생선 달걀 음식 식탁 그릇
        접시 젓가락 칼 옷 신발 양말 장갑 가방 우산 거울 이불 베개 선물 돈 시간 아침 점심 저녁 밤 여름 가을
        겨울 봄 생일 주말 약속 계획 질문 대답 방법 목적 경험 지식 기술 과학 음악 미술 춤 운동 말 글 문장
        비밀 꿈 희망 사랑 마음 생각 기억 힘 건강 전쟁 동물 곰 말벌 뱀 사슴 군인 경찰 상인 주인 손님 이웃
        동생 형 삼촌 왕 임금 여행 직업 공장
    """,
    # verbal nouns that take 하다
    "VN": """
        공부 연구 준비 설명 확인 발견 사용 선택 시작 완성 정리 청소 요리 관찰 기록 방문 소개 초대 보호 이해
        걱정 기대 약속 결정 계산 측정 수리 설계 제작 생산 수출 판매 구입 주문 배달 운전 관리 교환 비교 분석
        토론 발표 번역 출판 보관 저장 수집 조사 개발 제안 거절 허락 칭찬 비판 사랑 존경 기억 변경 추가 삭제
        연결 분리 포장
    """,
    # intransitive verbal nouns
    "VX": """
        여행 운동 산책 수영 노래 성공 실패 출발 도착 대답 이야기 고민 침묵 등장 성장 졸업 결혼 취직 외출
        휴식 생활 노력 활동
    """,
    # consonant stems with 습니다 / 고 / 지만
    "VC": """
        읽 먹 찾 입 받 잡 묻 심 얻 닦 씻 벗 찍 잊 믿 넣 놓 만들었 그렸 보냈 샀 팔았 배웠 가르쳤 열었 닫았
        버렸 들었 썼 불렀 던졌 빌렸 주웠 감췄 나눴 옮겼 고쳤 모았 지켰 피했 구했
    """,
    "VI": """
        웃었 울었 앉았 섰 걸었 뛰었 잤 쉬었 놀았 갔 왔 떠났 돌아왔 나타났 사라졌 넘어졌 떨었 자랐 변했 늦었
        숨었 날았
    """,
    # adjectives: the form before a noun, and the stem before 습니다
    "ADJ": """
        작은 큰 좋은 나쁜 새로운 오래된 아름다운 예쁜 높은 낮은 넓은 좁은 밝은 어두운 따뜻한 추운 더운
        시원한 조용한 시끄러운 깨끗한 더러운 똑똑한 어리석은 용감한 친절한 정직한 게으른 부지런한 행복한
        슬픈 외로운 가난한 유명한 평범한 중요한 간단한 복잡한 어려운 쉬운 위험한 안전한 이상한 신기한 비싼
        싼 단단한 부드러운 거친 신선한 달콤한 매운 쓴 짠 무거운 가벼운 빠른 느린 빨간 파란 노란 하얀 검은
        푸른 둥근 긴 짧은 깊은 얕은 낡은 젊은 늙은
    """,
    "ADJS": """
        작 좋 높 낮 넓 좁 밝 많 적 짧 깊 얕 낡 젊 늙 맑 굵 가늘었 컸 나빴 예뻤 슬펐 아름다웠 어려웠 쉬웠
        무거웠 추웠 더웠
    """,
    "ADV": """
        자주 항상 가끔 이미 아직 드디어 갑자기 천천히 빨리 조용히 열심히 함께 다시 혼자 일찍 늦게 몰래 정말
        매우 아주 거의 아마 반드시 절대로 특히 먼저 나중에 곧 방금 계속 서로 직접 잠시 마침내 겨우 오히려
        더욱 무척
    """,
    "TIME": """
        오늘 어제 내일 지금 요즘 옛날에 그때 아침에 저녁에 밤에 봄에 여름에 가을에 겨울에 작년에 내년에
        주말에 날마다
    """,
    "LINK": "그러나 그래서 그리고 하지만 그런데 그러므로 또한 물론 결국 다만 게다가 반면에 따라서",
    "DET": "이 그 저 어느 모든 여러 우리 나의 너의 그녀의 다른 어떤 새 헌 첫",
    "PRO": "나는 저는 너는 그는 그녀는 우리는 그들은 누군가는 아무도 모두가",
    "NUM": "한 두 세 네 다섯 여섯 일곱 여덟 아홉 열 스무 서른",
    "CNT": "개 명 마리 권 장 대 번 송이 그루 잔",
    "UNIT": "년 달 주 시간 분 일",
    "SYL": """
        김 이 박 최 정 강 조 윤 장 임 한 오 서 신 권 황 안 송 류 홍 전 고 문 양 손 배 백 허 유 남 심 노 하
        곽 성 차 주 우 구 민 진 지 엄 채 원 천 방 공 현 함 변 염 여 추 도 소 석 선 설 마 길 연 위 표 명 기
    """,
    "GIVEN": """
        민 준 서 윤 하 은 지 우 도 현 예 시 수 아 진 영 경 숙 철 희 호 훈 태 승 재 혁 빈 나 라 린 솔 별 온
        율 찬 규 석 용 환
    """,
    "TOWN": "동 구 산 천 주 포 원 성 양 평 진 릉 안 령 곡 촌 도 해 강 월",
    "DIGIT": "1 2 3 4 5 6 7 8 9 0",
}

RULES: dict[str, tuple[str, ...]] = {
    "S": (
        "CL .",
        "CL .",
        "CL .",
        "CL .",
        "CLK CL .",
        "CLK CL .",
        "CLB , CL .",
        "LINK CL .",
        "WHEN CL .",
        "WHEN , CL .",
        "LOC TOP 있습니다 .",
        "LOC SUB 없었습니다 .",
        "왜 SUB OBJ VN+합니까 ?",
        "SUB OBJ VN+했습니까 ?",
        "누가 OBJ VC+습니까 ?",
        '" CL . " 라고 TOP VN+했습니다 .',
        "SUB OBJ VN+하면 CL .",
        "OBJ VN+하세요 !",
        "SUB VI+기 때문에 CL .",
        "TOP OBJ VN+한다고 말했습니다 .",
        "NV+와 NC+과 NV+도 VX+했습니다 .",
        "CLK CLK CL .",
    ),
    "CL": (
        "TOP OBJ VC+습니다",
        "SUB OBJ VN+합니다",
        "TOP LOC OBJ VN+했습니다",
        "TOP ADV OBJ VC+습니다",
        "SUB LOC VI+습니다",
        "TOP ADV VI+습니다",
        "OBJ SUB VN+했습니다",
        "PRO OBJ VN+하지 않았습니다",
        "PRO LOC VX+합니다",
        "TOP ADJS+습니다",
        "TOP ADV ADJS+습니다",
        "TOP SUB VX+했습니다",
        "WHEN SUB OBJ VC+습니다",
        "PRO OBJ VN+할 수 있습니다",
        "TOP OBJ VN+하고 싶습니다",
        "SUB WITH VX+했습니다",
        "TOP NV+입니다",
        "TOP ADJ NC+입니다",
        "TOP NV+에게 OBJ VC+습니다",
        "NAME+은 OBJ INS VN+했습니다",
        "TOP NC+보다 ADV ADJS+습니다",
    ),
    "CLK": ("TOP OBJ VC+고", "SUB VI+고", "TOP OBJ VN+하고", "SUB OBJ VN+해서", "TOP ADJS+고", "SUB LOC VX+하면서"),
    "CLB": ("TOP OBJ VC+지만", "SUB VI+지만", "TOP OBJ VN+했지만", "TOP ADJS+지만", "PRO OBJ VN+하려고 했으나"),
    "PRE": ("ADJ", "DET", "DET ADJ", "NV+의", "NC+의", "OBJ VN+한", "NUM CNT+의", "NAME+의", "ADJ"),
    "TOP": ("NV+는", "NC+은", "PRE NV+는", "PRE NC+은", "NAME+은", "NAME+은", "PRE NC+들은"),
    "SUB": ("NV+가", "NC+이", "PRE NV+가", "PRE NC+이", "NAME+이", "PRE NC+들이"),
    "OBJ": ("NV+를", "NC+을", "NV+를", "NC+을", "ADJ NV+를", "ADJ NC+을", "DET NC+을", "NV+와 NC+을", "NC NUM CNT+를"),
    "LOC": (
        "NC+에서",
        "NV+에서",
        "PRE NC+에서",
        "NC 앞에서",
        "NV 옆에서",
        "NC 안에",
        "NV 위에",
        "PLACE+에서",
        "NC 뒤에",
        "PLACE+까지",
    ),
    "WITH": ("NV+와", "NC+과", "PRE NV+와 함께", "NAME+과"),
    "INS": ("NV+로", "NC+으로", "ADJ NC+으로"),
    "WHEN": ("TIME", "TIME", "YEAR+년에", "NUM UNIT 전에", "DIGIT+시에", "NUM 번째 날에"),
    "YEAR": ("1+DIGIT+DIGIT+DIGIT", "19+DIGIT+DIGIT", "20+DIGIT+DIGIT"),
    "PLACE": ("SYL+TOWN", "SYL+GIVEN+TOWN"),
    "NAME": ("SYL+GIVEN", "SYL+GIVEN+GIVEN", "SYL+GIVEN+GIVEN", "SYL+TOWN"),
}
