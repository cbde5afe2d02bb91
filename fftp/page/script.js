// Convenience alone: the page shows everything without it.
"use strict";
const cards = [...document.querySelectorAll(".card")];
const tools = document.querySelector(".tools");

function choices(select, name) {
  for (const value of [...new Set(cards.map((card) => card.dataset[name]))].sort()) select.add(new Option(value, value));
}

if (tools) {
  const [truth, taken] = ["truth", "taken"].map((name) => document.getElementById("of-" + name));
  const wrong = document.getElementById("only-wrong");
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  choices(truth, "true");
  choices(taken, "taken");
  const show = () => {
    let shown = 0;
    for (const card of cards) {
      const data = card.dataset;
      card.hidden = (truth.value && data.true !== truth.value) || (taken.value && data.taken !== taken.value)
        || (wrong.checked && data.wrong === "0");
      shown += !card.hidden;
    }
    count.textContent = `${shown} of ${cards.length} shown`;
    const by = order.value;
    const sorted = [...cards].sort((a, b) =>
      (by === "rank" ? 0 : a.dataset[by].localeCompare(b.dataset[by])) || a.dataset.rank - b.dataset.rank);
    cards[0].parentNode.append(...sorted);
  };
  for (const control of [truth, taken, wrong, order]) control.addEventListener("change", show);
  tools.hidden = false;
  show();
}

// One sound at a time; a line over the spectrogram shows where it is, and a click there goes there.
for (const card of cards) {
  const audio = card.querySelector("audio");
  const seen = card.querySelector(".seen");
  if (!audio) continue;
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
  });
  if (!seen) continue;
  const head = document.createElement("div");
  head.className = "head";
  head.hidden = true;
  seen.append(head);
  const seconds = Number(seen.dataset.seconds);
  const follow = () => {
    head.hidden = audio.currentTime === 0 && audio.paused;
    head.style.left = `${Math.min(100, (100 * audio.currentTime) / seconds)}%`;
    if (!audio.paused) requestAnimationFrame(follow);
  };
  for (const event of ["play", "pause", "seeked", "ended"]) audio.addEventListener(event, follow);
  seen.style.cursor = "pointer";
  seen.addEventListener("click", (event) => {
    const box = seen.getBoundingClientRect();
    audio.currentTime = (seconds * (event.clientX - box.left)) / box.width;
    audio.play();
  });
}
