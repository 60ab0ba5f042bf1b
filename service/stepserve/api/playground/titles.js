// What requests and their images are called on the page.

/** The title of a request for a body; `nameOfClass` says what a class is called. */
export function titleFor({ prompt, prompts, class_label: label, model }, task, nameOfClass) {
  if (prompts) return `${prompts[0]} and ${prompts.length - 1} more`;
  if (prompt) return prompt;
  return label === undefined ? `${model}, ${task}` : nameOfClass(label);
}

/** The title of image `index`: of several prompts, its own. */
export const titleOf = ({ title, body }, index) => body.prompts?.[Math.floor(index / body.n)] ?? title;
