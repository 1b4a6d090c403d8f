// Buttons on the cards of the Lora tab, which put a LoRA into EST-LoRA's panel; and what that panel lacks for keyboards
// and screen readers. The panel works without it.
(() => {
    "use strict";

    const CARDS = '[id$="2img_lora_cards"]';
    const CARD = `${CARDS} .card[data-name]`;
    const PANEL = '[id$="2img_estlora_enabled"]';
    const PICKLE = /\.(ckpt|pt|pth|bin)$/i;
    const SHOWN_MS = 3000;

    // -- the cards: one pair of buttons, which goes to the card where the pointer or the keyboard is

    const pair = document.createElement("span");
    const said = document.createElement("span");
    let picked, timer;

    function makePair() {
        pair.className = "est-lora-card-buttons";
        for (const role of ["subject", "style"]) {
            const button = document.createElement("button");
            button.type = "button";
            button.dataset.role = role;
            button.textContent = `as ${role}`;
            pair.append(button);
        }
        said.setAttribute("role", "status");
        pair.append(said);
        pair.addEventListener("click", press);
        pair.addEventListener("keydown", walk);
    }

    function isPickle(card) {
        return PICKLE.test(card.querySelector("[data-clipboard-text]")?.dataset.clipboardText ?? "");
    }

    function canBeUsed(card) {
        return card.matches(CARD) && card.offsetParent && !isPickle(card);
    }

    function moveTo(card) {
        if (pair.parentElement === card || isPickle(card)) return;
        const focused = pair.contains(document.activeElement) && document.activeElement;
        for (const button of pair.querySelectorAll("button")) {
            button.title = `Use ${card.dataset.name} as EST-LoRA's ${button.dataset.role}`;
            button.setAttribute("aria-label", button.title);
        }
        say("");
        card.append(pair);
        if (focused) focused.focus({preventScroll: true});
    }

    function say(sentence) {
        clearTimeout(timer);
        said.textContent = sentence;
        if (sentence) timer = setTimeout(say, SHOWN_MS, "");
    }

    function press(event) {
        event.stopPropagation(); // the card's own click puts a <lora:...> into the prompt
        const card = pair.closest(CARD);
        const {role} = event.target.dataset;
        if (!card || !role) return;
        picked = {name: card.dataset.name, role};
        const [tab] = card.closest(CARDS).id.split("_");
        document.querySelector(`#script_${tab}_estlora_pick_${role}`)?.click();
    }

    // From card to card with the arrows: so a page of cards is two stops of the Tab key, not two for each card.
    function walk(event) {
        const way = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[event.key];
        if (!way) return;
        event.preventDefault();
        let card = pair.closest(CARD)?.[way];
        while (card && !canBeUsed(card)) card = card[way];
        if (!card) return;
        moveTo(card);
        card.scrollIntoView({block: "nearest"});
    }

    // What the panel's hidden buttons send: the card's name, and the other LoRA as it is.
    window.estLoraPicked = (_, other) => {
        if (!picked) return ["", other];
        say(`\u2713 ${picked.role}${other && other !== "None" ? ", EST-LoRA is on" : ""}`);
        return [picked.name, other];
    };

    document.addEventListener("pointerover", (event) => {
        const card = event.target.closest?.(CARD);
        if (card) moveTo(card);
    });

    // Whoever comes to the Lora tab with the keyboard finds the pair there, on the first card unless it is on another.
    document.addEventListener("keydown", (event) => {
        const tabs = event.key === "Tab" && event.target.closest?.('[id$="2img_extra_tabs"]');
        const cards = tabs && tabs.querySelector(CARDS);
        if (!cards?.offsetParent || (cards.contains(pair) && pair.offsetParent)) return;
        const first = [...cards.children].find(canBeUsed);
        if (first) moveTo(first);
    });

    // -- the panel: when it follows what changes

    // Waits until the panel of a tab is seen, and returns the values. Of several who wait for the same purpose only the
    // last goes on, for all of them.
    const waiting = {};
    window.estLoraSeen = (tab, purpose, ...values) => {
        const part = document.querySelector(`#script_${tab}_estlora_lean`);
        const key = `${tab} ${purpose}`;
        waiting[key]?.disconnect();
        return new Promise((goOn) => {
            waiting[key] = new ResizeObserver(() => {
                if (!part.offsetParent) return;
                waiting[key].disconnect();
                goOn(values);
            });
            waiting[key].observe(part);
        });
    };

    // -- the panel: what gradio leaves without a name or out of the keyboard's reach

    const label = (part) => part?.querySelector("[data-testid=block-info]")?.textContent.trim() ?? "";

    function mend(panel) {
        for (const number of panel.querySelectorAll("input[type=number]:not([aria-label])")) {
            number.setAttribute("aria-label", label(number.closest(".block")));
        }
        for (const words of panel.querySelectorAll("fieldset")) {
            words.setAttribute("role", "radiogroup");
            words.setAttribute("aria-label", label(words));
        }
        panel.querySelector('[id$="_estlora_refresh"]')?.setAttribute("aria-label", "Refresh the lists of LoRAs");
        panel.querySelector('[id$="_estlora_said"]')?.setAttribute("role", "status");
        panel.querySelectorAll(".label-wrap").forEach(mendTitle);
    }

    function mendTitle(title) {
        const name = title.querySelector("span")?.textContent.trim() ?? "";
        title.querySelector("input[type=checkbox]")?.setAttribute("aria-label", name);
        const handle = title.matches("button") ? title : title.querySelector(".icon");
        if (!handle) return;
        if (handle !== title) {
            handle.tabIndex = 0;
            handle.setAttribute("role", "button");
            handle.setAttribute("aria-label", `${name}: unfold`);
            handle.addEventListener("keydown", (event) => {
                if (event.key !== "Enter" && event.key !== " ") return;
                event.preventDefault();
                handle.click();
            });
        }
        const tell = () => handle.setAttribute("aria-expanded", title.classList.contains("open"));
        new MutationObserver(tell).observe(title, {attributeFilter: ["class"]});
        tell();
    }

    makePair();
    if (typeof onUiLoaded === "function") onUiLoaded(() => document.querySelectorAll(PANEL).forEach(mend));
})();
