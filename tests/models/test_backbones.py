"""Every architecture module of the installed timm makes a stream: forward, backward, finite."""

import gc
from typing import NamedTuple, Optional

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._registry import _model_to_module

from timm_bilinear import BilinearCNN


class Case(NamedTuple):
    """A backbone and the image size to try it at; `img_size` if it has to be built for that size."""

    name: str
    size: int = 96
    img_size: Optional[int] = None


# The smallest model of each module of timm.models by parameters, at a small legal size.
BACKBONES = {
    'beit': Case('beit_base_patch16_224', 224),
    'byoanet': Case('halonet_h1', 256),
    'byobnet': Case('test_byobnet'),
    'cait': Case('cait_xxs24_224', 224),
    'coat': Case('coat_tiny', 224),
    'convit': Case('convit_tiny', 224),
    'convmixer': Case('convmixer_768_32'),
    'convnext': Case('test_convnext'),
    'cpubone': Case('cpubone_nano'),
    'crossvit': Case('crossvit_tiny_240', 240),
    'csatv2': Case('csatv2'),
    'cspnet': Case('cs3darknet_focus_s'),
    'cspnext': Case('cspnext_tiny'),
    'davit': Case('davit_tiny'),
    'deepseek_vit': Case('deepseek_vit_412m', 112),
    'deit': Case('deit_tiny_patch16_224', 224),
    'densenet': Case('densenet121'),
    'dla': Case('dla46x_c'),
    'dpn': Case('dpn48b'),
    'edgenext': Case('edgenext_xx_small'),
    'efficientformer': Case('efficientformer_l1', 224),
    'efficientformer_v2': Case('efficientformerv2_s0', 224),
    'efficientnet': Case('test_efficientnet'),
    'efficientvim': Case('efficientvim_m1'),
    'efficientvit_mit': Case('efficientvit_b0'),
    'efficientvit_msra': Case('efficientvit_m0', 224),
    'eva': Case('vit_tiny_patch16_dinov3_qkvb', 256),
    'fasternet': Case('fasternet_t0'),
    'fastvit': Case('fastvit_t8'),
    'focalnet': Case('focalnet_tiny_srf'),
    'gcvit': Case('gcvit_xxtiny', 224),
    'gemma4_vit': Case('gemma4_vit_167m'),
    'ghostnet': Case('ghostnet_050'),
    'hardcorenas': Case('hardcorenas_b'),
    'hgnet': Case('hgnetv2_b0'),
    'hiera': Case('hiera_tiny_224', 224),
    'hieradet_sam2': Case('sam2_hiera_tiny'),
    'hrnet': Case('hrnet_w18_small'),
    'iformer': Case('iformer_t'),
    'inception_next': Case('inception_next_atto'),
    'inception_resnet_v2': Case('inception_resnet_v2'),
    'inception_v3': Case('inception_v3'),
    'inception_v4': Case('inception_v4'),
    'lcnetv2': Case('lcnetv2_small'),
    'levit': Case('levit_128s', 224),
    'lowformer': Case('lowformer_b0'),
    'mambaout': Case('test_mambaout'),
    'maxxvit': Case('test_coatnet', 160),
    'metaformer': Case('poolformerv2_s12'),
    'mlp_mixer': Case('gmlp_ti16_224', 224),
    'mobilenetv3': Case('mobilenetv3_small_050'),
    'mobilenetv5': Case('mobilenetv5_base'),
    'mobilevit': Case('mobilevit_xxs'),
    'mvitv2': Case('mvitv2_tiny', 224),
    'naflexvit': Case('naflexvit_base_patch16_parfac_gap'),
    'nasnet': Case('nasnetalarge'),
    'nest': Case('nest_tiny', 224),
    'nextvit': Case('nextvit_small'),
    'nfnet': Case('test_nfnet'),
    'pit': Case('pit_ti_224', 224),
    'pnasnet': Case('pnasnet5large'),
    'pvt_v2': Case('pvt_v2_b0'),
    'qwen3_vit': Case('qwen3_vit_88m'),
    'rdnet': Case('rdnet_tiny'),
    'regnet': Case('regnetx_002'),
    'repghost': Case('repghostnet_050'),
    'repvit': Case('repvit_m1'),
    'res2net': Case('res2next50'),
    'resnest': Case('resnest14d'),
    'resnet': Case('test_resnet'),
    'resnetv2': Case('resnetv2_18'),
    'rexnet': Case('rexnet_100'),
    'selecsls': Case('selecsls42'),
    'senet': Case('legacy_seresnet18'),
    'sequencer': Case('sequencer2d_s', 224),
    'shvit': Case('shvit_s1'),
    'sknet': Case('skresnet18'),
    'starnet': Case('starnet_s050'),
    'swiftformer': Case('swiftformer_xs', 224),
    'swin_transformer': Case('swin_tiny_patch4_window7_224', 224),
    'swin_transformer_v2': Case('swinv2_tiny_window8_256', 256),
    'swin_transformer_v2_cr': Case('swinv2_cr_tiny_224', 224),
    'tiny_vit': Case('tiny_vit_5m_224'),
    'tnt': Case('tnt_s_legacy_patch16_224', 224),
    'tresnet': Case('tresnet_m'),
    'twins': Case('twins_svt_small', 224),
    'vgg': Case('vgg11'),
    'visformer': Case('visformer_tiny', 224),
    'vision_transformer': Case('test_vit', 160),
    'vision_transformer_hybrid': Case('vit_tiny_r_s16_p8_224', 224),
    'vision_transformer_relpos': Case('test_vit_relpos', 160),
    'vision_transformer_sam': Case('samvit_base_patch16_224', 224),
    'vitamin': Case('vitamin_small_224', 224),
    'volo': Case('volo_d1_224', 224),
    'vovnet': Case('ese_vovnet19b_slim_dw'),
    'xception': Case('legacy_xception'),
    'xception_aligned': Case('xception41p'),
    'xcit': Case('xcit_nano_12_p8_224', 224),
}
WALKED = set()


def architectures():
    """Modules of the models that timm registers itself."""
    return {m for name, m in _model_to_module.items() if m != 'bcnn'}


def test_table_is_complete():
    assert set(BACKBONES) == architectures()
    for module, case in BACKBONES.items():
        assert _model_to_module[case.name] == module


@pytest.mark.parametrize('module', BACKBONES)
def test_backbone(module):
    case = BACKBONES[module]
    gc.collect()  # before the next one, of up to 400 M parameters
    torch.manual_seed(0)
    kwargs = {} if case.img_size is None else dict(img_size=case.img_size)
    model = timm.create_model('bcnn', backbone_a=case.name, num_classes=3, proj_dim=16, **kwargs).train()
    x = torch.randn(2, 3, case.size, case.size)
    assert isinstance(model, BilinearCNN)
    features = model.forward_features(x)
    assert features.dim() == 4 and features.shape[:2] == (2, model.num_features)
    # NCHW, not NHWC: the stride is that of the last level.
    reduction = model.feature_info[-1]['reduction']
    assert all(1 <= s <= case.size / reduction + 1 for s in features.shape[2:])
    logits = model.forward_head(features)
    assert logits.shape == (2, 3) and logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values())
    assert grads['head.fc.weight'].ne(0).any()
    assert any(g.ne(0).any() for name, g in grads.items() if name.startswith('stream_a.'))
    WALKED.add(module)


def test_all_were_walked(request):
    if not all(f'test_backbone[{m}]' in {item.name for item in request.session.items} for m in BACKBONES):
        pytest.skip('a part of the walk was selected')
    print(f'{len(WALKED)} of {len(architectures())} architecture modules')
    assert WALKED == architectures()
