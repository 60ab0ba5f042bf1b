// Puts the page together: the form, requests and their cards, the running batch, keys of the keyboard.

import * as form from "./form.js";
import * as inputs from "./inputs.js";
import * as loom from "./loom.js";
import { $, button, draw, setUpTheme } from "./page.js";
import * as requests from "./requests.js";
import { canDo, choose, most } from "./tasks.js";
import { titleFor } from "./titles.js";
import * as viewer from "./viewer.js";

const IDEAS = ["rocket on a blue background", "sunflower", "cat face", "pizza"];
/** Prompt, steps, scheduler, guidance: nothing in them agrees but the size. */
const DEMO = [
  ["cat face", 60, "DDIMScheduler", 4], ["pizza", 12, "EulerDiscreteScheduler", 4],
  ["red heart on a yellow background", 35, "DPMSolverMultistepScheduler", 4],
  ["soccer ball", 8, "EulerAncestralDiscreteScheduler", 1], ["sunflower", 24, "UniPCMultistepScheduler", 5],
  ["rocket on a blue background", 18, "DDPMScheduler", 4],
];
const DEMO_PAUSE_MS = 260;  // so that each is seen to join

async function submit() {
  form.say("");
  if (!form.model()?.ready) return form.say("The model is not ready yet.");
  const choice = inputs.plan();
  if (choice.problem) {
    if (!$("prompt-field").hidden && !$("prompt").value.trim()) $("prompt").focus();
    return form.say(choice.problem);
  }
  enqueue(choice, form.body(choice), await inputs.files());
  showStage();
}

function enqueue({ url, task }, body, files = []) {
  requests.enqueue({ url, body, files, title: titleFor(body, task, inputs.className) });
}

/** What the page can think up by itself. */
const withoutImages = (model) => ({ prompt: Math.min(most(model, "prompt"), 1), class_label: Math.min(most(model, "class_label"), 1) });

/** What is offered to begin with, where the model needs no image for it. */
function showOffers() {
  const model = form.model();
  if (!model) return;
  const isPlain = canDo(model, withoutImages(model));
  $("demo").hidden = !isPlain;
  $("ideas").hidden = $("ideas-hint").hidden = !isPlain || !most(model, "prompt");
}

/** On a phone the images are below the form. */
function showStage() {
  if (!matchMedia("(max-width: 900px)").matches) return;
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("stage").scrollIntoView({ behavior: isCalm ? "instant" : "smooth" });
}

function demo() {
  form.say("");
  const model = form.model();
  if (!model?.ready) return form.say("The model is not ready yet.");
  const { negative_prompt, ...rest } = form.settings(), choice = choose(model, withoutImages(model));
  DEMO.forEach(([prompt, steps, wanted, guidance], index) => setTimeout(() => {
    const scheduler = model.schedulers.includes(wanted) ? wanted : rest.scheduler;
    const { minimum, maximum } = form.stepsOf(model, scheduler);
    const guided = "guidance_scale" in rest ? { guidance_scale: Math.min(guidance, model.max_guidance_scale) } : {};
    enqueue(choice, {
      ...(choice.inputs.prompt ? { prompt } : {}), ...(choice.inputs.class_label ? { class_label: inputs.anyClass() } : {}),
      ...rest, ...guided, scheduler, n: 1, seed: draw(), num_inference_steps: Math.max(minimum, Math.min(steps, maximum)),
    });
  }, index * DEMO_PAUSE_MS));
  showStage();
}

function onKey(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && event.target === $("key")) {
    // Tries the key, instead of making an image without one.
    event.preventDefault();
    event.target.blur();
    return;
  }
  const isPlainEnter = event.target === $("prompt") && !event.shiftKey && !inputs.isOneALine();
  if (event.key === "Enter" && !viewer.isOpen() && (event.ctrlKey || event.metaKey || isPlainEnter)) {
    event.preventDefault();
    submit();
  }
  if (event.key === "Escape" && !viewer.isOpen()) requests.stopLatest();
}

function showIdeas() {
  $("ideas").replaceChildren(...IDEAS.map((idea) => button(idea, () => {
    $("prompt").value = idea;
    submit();
  })));
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("demo").addEventListener("click", demo);
addEventListener("keydown", onKey);
$("cards").addEventListener("pointerover", (event) => loom.point(event.target.closest(".card")?.dataset.id));
$("cards").addEventListener("pointerleave", () => loom.point(null));
setUpTheme();
inputs.setUp(form.say);
form.setUp(() => { showOffers(); loom.wake(); });
viewer.setUp();
loom.setUp({ model: form.model, isBusy: requests.isBusy, progress: requests.progress, lost: form.findModels });
showIdeas();
requests.showGallery();
form.findModels();
