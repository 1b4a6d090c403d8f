// Completion of <est:...> in prompts, where the extension "tagcomplete" is installed: names of LoRAs in the tag's first
// two places, then knobs and their choices.
(() => {
    "use strict";

    const PREFIX = "script_txt2img_estlora_";
    let rest = ""; // what of the tag is behind the cursor

    function teach() {
        const parts = [typeof PARSERS, typeof QUEUE_SANITIZE, typeof QUEUE_AFTER_INSERT, typeof AutocompleteResult];
        if (parts.includes("undefined")) return;
        const type = ResultType.yamlWildcard; // one that is put in without a comma or a space behind it
        const isOurs = (given, text) => given === type && text.startsWith("<est:");
        QUEUE_SANITIZE.unshift((given, text) => (isOurs(given, text) ? text : null));
        QUEUE_AFTER_INSERT.unshift((given, text, prompt, area) => {
            const end = area.selectionStart - rest.length;
            if (isOurs(given, text)) area.setSelectionRange(end, end);
        });
        PARSERS.push({
            triggerCondition: () => tagword.startsWith("<est:"),
            parse: (area) => completions(area).map((one) => Object.assign(new AutocompleteResult(), {type, ...one})),
        });
    }

    function completions(area) {
        const before = area.value.slice(0, area.selectionStart).match(/<est:[^<>]*$/i)?.[0];
        if (!before || !tagword.startsWith(before.toLowerCase())) return [];
        rest = area.value.slice(area.selectionStart).slice(0, tagword.length - before.length);
        const pieces = before.split(":");
        const typed = pieces.pop().toLowerCase();
        const kept = ["<est", ...pieces.slice(1), ""].join(":");
        const given = (options, end) => options
            .filter(([text]) => text.toLowerCase().includes(typed))
            .map(([text, meta]) => ({text: kept + text + (rest ? "" : end) + rest, meta}))
            .filter(({text}) => text !== before + rest);
        if (pieces.length === 1) return given(names("subject"), ":");
        if (pieces.length === 2) return given(names("style"), ">");
        return typed.includes("=") ? given(choices(), ">") : given(keys(), "");
    }

    function names(role) {
        const files = loras.map(([path]) => path).filter((path) => path.endsWith(".safetensors"));
        const stems = files.map((path) => path.split("/").pop().replace(/\.safetensors$/, ""));
        return stems.filter((stem) => !/[:>=#]/.test(stem)).map((stem) => [stem, role]);
    }

    // The panel knows the knobs: (key, what it is called, the words it may be).
    function knobs() {
        return [...document.querySelectorAll(`[id^="${PREFIX}"].est-lora-knob`)].map((part) => ({
            key: part.id.slice(PREFIX.length),
            label: part.querySelector("[data-testid=block-info]")?.textContent.trim() ?? "",
            words: [...part.querySelectorAll("input[type=radio]")].map((word) => word.value),
        }));
    }

    const keys = () => knobs().map(({key, label}) => [`${key}=`, label]);
    const choices = () => knobs().flatMap(({key, label, words}) => words.map((word) => [`${key}=${word}`, label]));

    if (typeof onUiLoaded === "function") onUiLoaded(teach); // it may be loaded after this file, but before the page
})();
