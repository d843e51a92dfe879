"use strict";
// Every word of the page, in the browser's language.
const WORDS = {
  en: {
    question: "Which work is better?",
    left: "Left", right: "Right", upper: "Upper", lower: "Lower", tie: "Equal", skip: "Skip", undo: "Undo", zoom: "Larger", space: "space",
    leftWork: "The left work", rightWork: "The right work",
    judged: (n, now) => `${n} judgements (${now} now)`,
    training: "learning …",
    accuracy: "of random pairs predicted",
    chosen: "of pairs to learn from predicted",
    consistency: "same verdict when asked again",
    share: (s) => `${s.hits} of ${s.count}, 95 %: ${percent(s.low)} – ${percent(s.high)}`,
    none: "none yet",
    firstHead: (n) => `After ${n} judgements a first model is trained; from then on it predicts every pair before you judge it, and this shows how often it is right.`,
    chart: "How often the model predicted your verdict, over the last 50 predictions",
    judgements: "judgements", chance: "chance", random: "random pairs", picked: "pairs to learn from",
    heads: (n, s) => `${n} ${n === 1 ? "model" : "models"} trained, the last one in ${s} s.`,
    noHead: (why) => `No model yet: ${why}`,
    notSaved: (why) => `Not saved: ${why}`,
    gone: "Not saved: the program does not answer. Is it still running in the terminal?",
    unreadable: "A picture can not be shown. Skip this pair.",
    unsure: "Only the random pairs of works kept from learning say how good the model is.",
    chosenPairs: "The pairs to learn from are chosen as those expected to tell most. In simulations that did not halve the judgements for every taste.",
    randomPairs: "The pairs to learn from are drawn at random: choosing them (--choose informative) did not halve the judgements for every taste in simulations.",
  },
  ko: {
    question: "어느 작품이 더 좋은가요?",
    left: "왼쪽", right: "오른쪽", upper: "위", lower: "아래", tie: "비슷함", skip: "건너뛰기", undo: "되돌리기", zoom: "크게", space: "스페이스",
    leftWork: "왼쪽 작품", rightWork: "오른쪽 작품",
    judged: (n, now) => `판정 ${n}개 (이번에 ${now}개)`,
    training: "학습 중 …",
    accuracy: "무작위 쌍 예측 적중",
    chosen: "학습용 쌍 예측 적중",
    consistency: "다시 물었을 때 같은 판정",
    share: (s) => `${s.count}개 중 ${s.hits}개, 95 %: ${percent(s.low)} – ${percent(s.high)}`,
    none: "아직 없음",
    firstHead: (n) => `판정이 ${n}개 모이면 첫 모델을 학습합니다. 그때부터 모델이 판정 전에 결과를 예측하고, 여기에 적중률이 표시됩니다.`,
    chart: "최근 50개 예측 가운데 모델이 판정을 맞힌 비율",
    judgements: "판정 수", chance: "우연", random: "무작위 쌍", picked: "학습용 쌍",
    heads: (n, s) => `모델을 ${n}번 학습했습니다. 마지막 학습은 ${s}초 걸렸습니다.`,
    noHead: (why) => `아직 모델이 없습니다: ${why}`,
    notSaved: (why) => `저장하지 못했습니다: ${why}`,
    gone: "저장하지 못했습니다: 프로그램이 응답하지 않습니다. 터미널에서 아직 실행 중인지 확인하세요.",
    unreadable: "그림을 표시할 수 없습니다. 이 쌍은 건너뛰세요.",
    unsure: "모델의 실력은 학습에 쓰이지 않는 작품의 무작위 쌍만이 말해 줍니다.",
    chosenPairs: "학습용 쌍은 가장 많은 것을 알려 줄 것으로 기대되는 쌍으로 고릅니다. 모의실험에서 모든 취향에 대해 판정 수를 절반으로 줄이지는 못했습니다.",
    randomPairs: "학습용 쌍은 무작위로 뽑습니다. 쌍을 고르는 방법(--choose informative)은 모의실험에서 모든 취향에 대해 판정 수를 절반으로 줄이지는 못했습니다.",
  },
};
const LANGUAGE = (navigator.languages || [navigator.language]).map((tag) => tag.slice(0, 2)).find((tag) => tag in WORDS) || "en";
const SAY = WORDS[LANGUAGE];

function percent(share) {
  return `${Math.round(100 * share)}\u00a0%`;
}
