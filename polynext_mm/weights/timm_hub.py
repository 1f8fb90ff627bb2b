"""Weights on the Hugging Face hub under timm's names: ``timm://convformer_s18.sail_in1k``."""

from collections import OrderedDict

from ..compat.optional import require_timm
from .errors import CheckpointError

SCHEME = 'timm://'


def read_timm(name: str) -> dict:
    """Fetch the weights that timm publishes under a name, once, and read them.

    timm's own loader does both. It prefers safetensors and reads pickles with ``weights_only``, so
    nothing in a file is executed.

    Args:
        name: 'timm://ARCH.TAG', as in ``timm.list_pretrained()``, or 'timm://ARCH' for the default
            tag.

    Returns:
        ``dict(state_dict=..., meta={})``, the keys as timm has them.

    Raises:
        ImportError: Without timm.
        CheckpointError: For a name that timm does not know or has no weights for, and for weights
            that cannot be fetched or read.
    """
    require_timm()
    from huggingface_hub import hf_hub_url
    from timm.models import get_pretrained_cfg, list_pretrained, load_state_dict_from_hf

    model = name.removeprefix(SCHEME)
    arch = model.partition('.')[0]
    known = list_pretrained(f'{arch}.*')
    config = get_pretrained_cfg(model) if model in (arch, *known) else None
    if config is None or not config.hf_hub_id:
        choice = (
            f'for {arch} there are {", ".join(known)}' if known else 'see timm.list_pretrained()'
        )
        raise CheckpointError(f'timm publishes no weights of the name {model!r}: {choice}')
    try:
        weights = load_state_dict_from_hf(config.hf_hub_id)
    except Exception as error:  # many kinds: no network, no space, a proxy, a damaged file
        reason = next(iter(str(error).strip().splitlines()), '')
        raise CheckpointError(
            f'could not fetch {name} ({type(error).__name__}: {reason}). Get '
            f'{hf_hub_url(config.hf_hub_id, "model.safetensors")} and give the path of the file as '
            'the checkpoint'
        ) from error
    state_dict = OrderedDict(weights)
    state_dict._metadata = {  # type: ignore[attr-defined] # where torch looks for it
        '': {'source': name}
    }
    return dict(state_dict=state_dict, meta={})
