"""The door the WebUI knocks at."""

from __future__ import annotations

from modules import scripts

from est_lora.hosts import webui

webui.register()


class EstLora(scripts.Script):
    """The AlwaysOn script; everything behind it is in the package."""

    def __init__(self):
        """Once for each tab, when all scripts are loaded."""
        super().__init__()
        self.plans = webui.Plans()
        self.panel = webui.Panel(self.plans)
        self.measuring = webui.Measuring()
        webui.add_axes()

    def title(self):
        """Its name, also in the API."""
        return webui.TITLE

    def show(self, is_img2img):
        """In txt2img and img2img."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """The panel."""
        return self.panel.build(self)

    def after_component(self, component, **kwargs):
        """A part of the host's page has been made."""
        self.panel.meet(component, kwargs.get("elem_id"))

    def process(self, p, *args):
        """A generation starts."""
        webui.begin(p, args, self)

    def before_process_batch(self, p, *args, **kwargs):
        """A batch is about to begin, its prompts not read yet."""
        webui.before_batch(p, self)

    def after_extra_networks_activate(self, p, *args, extra_network_data=None, **kwargs):
        """The prompts of a batch, or of a second pass, have been read."""
        webui.prompts_read(p, extra_network_data, self)

    def process_batch(self, p, *args, **kwargs):
        """The same, where the host was told to disregard tags."""
        if p.disable_extra_networks:
            webui.prompts_read(p, p.extra_network_data, self)

    def process_before_every_sampling(self, p, *args, **kwargs):
        """The sampler is about to start."""
        webui.before_sampling(p, self)
