"""Small random models of the real classes of each family, with real processors of real size limits.

Each takes a fraction of a second to make; nothing is downloaded.
"""

import functools

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mmkit.chat.templates import CHAT_TEMPLATES, tiny_processor
from mmkit.models.families import find_family
from mmkit.models.tiny import tiny_random_model

VOCAB_SIZE = 512
WIDTH = 64
TILE = 32  # pixels; 4 × 4 patches of 8
SQUARE = dict(height=TILE, width=TILE)
QWEN_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|image_pad|> <|video_pad|> "
    "<|vision_start|> <|vision_end|>"
)
TILE_TAGS = " ".join(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
IDEFICS3_TOKENS = (
    "<pad> <|begin_of_text|> <end_of_utterance> <image> <fake_token_around_image> <global-img> "
    + TILE_TAGS
)
# as the published checkpoints spell their turns; BLIP-2 and PaliGemma have none, their family does
TURNS_OF_IDEFICS3 = (
    "<|begin_of_text|>{%- for m in messages -%}{{ m.role | capitalize }}:{%- for p in m.content -%}"
    "{{ '<image>' if p.type == 'image' else ' ' + p.text | trim }}{%- endfor -%}"
    "<end_of_utterance>\n{% endfor -%}{%- if add_generation_prompt -%}Assistant:{%- endif -%}"
)
TURNS = dict(
    llava_next=CHAT_TEMPLATES["llava"],
    qwen2_5_vl=CHAT_TEMPLATES["qwen2_vl"],
    qwen3_vl=CHAT_TEMPLATES["qwen2_vl"],
    idefics3=TURNS_OF_IDEFICS3,
    smolvlm=TURNS_OF_IDEFICS3,
)


def byte_tokenizer(special, **named):
    "A token for each byte, after the special ones: padding, begin, end, image, and others."
    special = special.split()
    words = [*special, *bytes_to_unicode().values()]
    bytes_only = models.BPE(vocab={word: k for k, word in enumerate(words)}, merges=[])
    tokenizer = Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        extra_special_tokens=named,
    )


def build(class_name, config):
    "A random model; what transformers starts at zero is drawn, so that the image matters."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, 0, 0.02)
    return model.eval()


def text_config(**options):
    return dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def vision_config(**options):
    return dict(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=8,
        **options,
    )


def images_only(processor_class):
    "A processor without the part for videos, which needs torchvision."
    get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
    return type(processor_class.__name__, (processor_class,), dict(get_attributes=get_attributes))


def make_of_mmkit(name):
    return tiny_random_model(name, vocab_size=1024), tiny_processor(name)


def make_llava_next():
    config = transformers.LlavaNextConfig(
        text_config=text_config(model_type="llama"),
        vision_config=vision_config(model_type="clip_vision_model"),
        image_token_index=3,
        image_grid_pinpoints=[[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]],
        vision_feature_layer=-1,
    )
    image_processor = LlavaNextImageProcessorPil(
        size=dict(shortest_edge=TILE),
        crop_size=SQUARE,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor,
        byte_tokenizer("<pad> <s> </s> <image>", image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return build("LlavaNextForConditionalGeneration", config), processor


def make_qwen(name):
    rope_parameters = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 8])
    vision = dict(
        depth=2,
        hidden_size=WIDTH,
        out_hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_heads=2,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    if name == "Qwen2_5_VL":
        vision |= dict(window_size=TILE, fullatt_block_indexes=[1])
    else:
        vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0])
    config = getattr(transformers, f"{name}Config")(
        text_config=text_config(head_dim=32, rope_parameters=rope_parameters),
        vision_config=vision,
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
        size=dict(shortest_edge=TILE * TILE, longest_edge=4 * TILE * TILE),
    )
    processor_class = images_only(getattr(transformers, f"{name}Processor"))
    tokenizer = byte_tokenizer(QWEN_TOKENS, image_token="<|image_pad|>")
    return build(f"{name}ForConditionalGeneration", config), processor_class(
        image_processor, tokenizer
    )


def make_idefics3(name="Idefics3"):
    config = getattr(transformers, f"{name}Config")(
        text_config=text_config(model_type="llama"),
        vision_config=vision_config(),
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
    )
    kind = SmolVLMImageProcessorPil if name == "SmolVLM" else Idefics3ImageProcessorPil
    image_processor = kind(
        size=dict(longest_edge=2 * TILE),
        max_image_size=dict(longest_edge=TILE),
        do_image_splitting=True,
    )
    # SmolVLM's own processor needs num2words, and writes images as Idefics3's does
    tokenizer = byte_tokenizer(IDEFICS3_TOKENS, image_token="<image>")
    processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4)
    return build(f"{name}ForConditionalGeneration", config), processor


def make_paligemma():
    vision = vision_config(
        model_type="siglip_vision_model", vision_use_head=False, projection_dim=WIDTH
    )
    config = transformers.PaliGemmaConfig(
        text_config=text_config(model_type="gemma", head_dim=32),
        vision_config=vision,
        image_token_index=3,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    image_processor = SiglipImageProcessorPil(size=SQUARE)
    image_processor.image_seq_length = 16
    tokenizer = byte_tokenizer("<pad> <bos> <eos> <image>", image_token="<image>")
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    return build("PaliGemmaForConditionalGeneration", config), processor


def make_blip2():
    tokenizer = byte_tokenizer("<pad> <s> </s> <image>")
    processor = transformers.Blip2Processor(
        BlipImageProcessorPil(size=SQUARE), tokenizer, num_query_tokens=4
    )
    return tiny_random_model("blip2", vocab_size=VOCAB_SIZE), processor


def make_instructblip():
    queries = text_config(encoder_hidden_size=WIDTH, cross_attention_frequency=1)
    del queries["num_key_value_heads"]
    config = transformers.InstructBlipConfig(
        vision_config=vision_config(initializer_range=0.02),  # its own is 1e-10
        qformer_config=queries,
        text_config=text_config(model_type="llama"),
        num_query_tokens=4,
        image_token_index=3,
    )
    tokenizer = byte_tokenizer("<pad> <s> </s> <image>")
    qformer_tokenizer = byte_tokenizer("<pad> <s> </s>")
    processor = transformers.InstructBlipProcessor(
        BlipImageProcessorPil(size=SQUARE), tokenizer, qformer_tokenizer, num_query_tokens=4
    )
    return build("InstructBlipForConditionalGeneration", config), processor


def make_clip():
    image_processor = CLIPImageProcessorPil(size=dict(shortest_edge=TILE), crop_size=SQUARE)
    tokenizer = byte_tokenizer("<pad> <s> </s>")
    ending = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ending  # the end speaks for a text
    processor = transformers.CLIPProcessor(image_processor, tokenizer)
    return tiny_random_model("clip", vocab_size=VOCAB_SIZE), processor


def make_siglip():
    image_processor = SiglipImageProcessorPil(size=SQUARE)
    processor = transformers.SiglipProcessor(image_processor, byte_tokenizer("<pad> <s> </s>"))
    return tiny_random_model("siglip", vocab_size=VOCAB_SIZE), processor


MAKERS = dict(
    gemma3=lambda: make_of_mmkit("gemma3"),
    llava=lambda: make_of_mmkit("llava"),
    llava_next=make_llava_next,
    qwen2_vl=lambda: make_of_mmkit("qwen2_vl"),
    qwen2_5_vl=lambda: make_qwen("Qwen2_5_VL"),
    qwen3_vl=lambda: make_qwen("Qwen3VL"),
    idefics3=make_idefics3,
    smolvlm=lambda: make_idefics3("SmolVLM"),
    paligemma=make_paligemma,
    mllama=lambda: make_of_mmkit("mllama"),
    blip2=make_blip2,
    instructblip=make_instructblip,
    clip=make_clip,
    siglip=make_siglip,
)


@functools.cache
def make_family(
    name,  # a key of `MAKERS`
):  # (model, processor), the same for every caller
    model, processor = MAKERS[name]()
    family = find_family(processor)
    if family.generates and not getattr(processor, "chat_template", None):
        processor.chat_template = TURNS.get(name) or family.chat_template
    return model, processor


def encode(
    processor,
    images,  # one for each row
    prompt="Describe it.",
):  # a batch for `model(**batch)`, as the processor makes it
    "Rows of an image and a prompt."
    image_token = getattr(processor, "image_token", None)
    has_placeholder = image_token and "Blip" not in type(processor).__name__
    text = f"{image_token}{prompt}" if has_placeholder else prompt
    is_nested = not isinstance(
        processor, (transformers.CLIPProcessor, transformers.SiglipProcessor)
    )
    is_nested &= "Blip" not in type(processor).__name__
    batch = processor(
        images=[[image] for image in images] if is_nested else images,
        text=[text] * len(images),
        return_tensors="pt",
        padding=True,
    )
    return {key: value for key, value in batch.items() if key != "token_type_ids"}
