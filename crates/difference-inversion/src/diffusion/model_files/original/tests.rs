use crate::diffusion::model_files::original::*;

#[test]
fn keys_of_the_unet() {
    for (original, name) in [
        ("time_embed.2.bias", "time_embedding.linear_2.bias"),
        ("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
        ("input_blocks.0.0.weight", "conv_in.weight"),
        (
            "input_blocks.1.0.in_layers.2.weight",
            "down_blocks.0.resnets.0.conv1.weight",
        ),
        (
            "input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight",
            "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        (
            "input_blocks.6.0.op.bias",
            "down_blocks.1.downsamplers.0.conv.bias",
        ),
        (
            "middle_block.1.proj_in.weight",
            "mid_block.attentions.0.proj_in.weight",
        ),
        (
            "middle_block.2.emb_layers.1.bias",
            "mid_block.resnets.1.time_emb_proj.bias",
        ),
        (
            "output_blocks.2.1.conv.weight",
            "up_blocks.0.upsamplers.0.conv.weight",
        ),
        (
            "output_blocks.5.2.conv.weight",
            "up_blocks.1.upsamplers.0.conv.weight",
        ),
        (
            "output_blocks.11.0.skip_connection.weight",
            "up_blocks.3.resnets.2.conv_shortcut.weight",
        ),
        ("out.2.bias", "conv_out.bias"),
    ] {
        assert_eq!(unet_key(original, 2).as_deref(), Some(name));
    }
    for unknown in [
        "",
        "input_blocks",
        "input_blocks.0.1.norm.weight",
        "input_blocks.x.0.op.weight",
        "input_blocks.1.3.norm.weight",
        "middle_block.3.norm.weight",
        "double_blocks.0.img_attn.qkv.weight",
    ] {
        assert_eq!(unet_key(unknown, 2), None, "{unknown}");
    }
}

#[test]
fn keys_of_the_autoencoder() {
    for (original, name, change) in [
        ("quant_conv.weight", "quant_conv.weight", Change::None),
        (
            "encoder.norm_out.bias",
            "encoder.conv_norm_out.bias",
            Change::None,
        ),
        (
            "encoder.down.2.downsample.conv.weight",
            "encoder.down_blocks.2.downsamplers.0.conv.weight",
            Change::None,
        ),
        (
            "encoder.down.1.block.0.nin_shortcut.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            Change::None,
        ),
        (
            "decoder.mid.block_2.norm1.weight",
            "decoder.mid_block.resnets.1.norm1.weight",
            Change::None,
        ),
        (
            "decoder.mid.attn_1.proj_out.weight",
            "decoder.mid_block.attentions.0.to_out.0.weight",
            Change::Squeeze,
        ),
        (
            "decoder.up.3.upsample.conv.bias",
            "decoder.up_blocks.0.upsamplers.0.conv.bias",
            Change::None,
        ),
        (
            "encoder.quant_conv.weight",
            "quant_conv.weight",
            Change::None,
        ),
        (
            "decoder.post_quant_conv.bias",
            "post_quant_conv.bias",
            Change::None,
        ),
        ("bn.running_var", "bn.running_var", Change::None),
    ] {
        assert_eq!(vae_key(original, 4), Some((name.to_owned(), change)));
    }
    for unknown in [
        "decoder.quant_conv.weight",
        "decoder.up.4.block.0.norm1.weight",
        "encoder.down.0.attn.0.q.weight",
        "encoder.up.0.block.0.norm1.weight",
        "loss.logvar",
    ] {
        assert_eq!(vae_key(unknown, 4), None, "{unknown}");
    }
}

#[test]
fn keys_of_open_clip() {
    let keys = |key| open_clip_keys(key).unwrap_or_default();
    assert_eq!(
        keys("positional_embedding"),
        [(
            "text_model.embeddings.position_embedding.weight".to_owned(),
            Change::None
        )]
    );
    let layer = "text_model.encoder.layers.7.self_attn";
    assert_eq!(
        keys("transformer.resblocks.7.attn.in_proj_bias"),
        ["q", "k", "v"]
            .iter()
            .enumerate()
            .map(|(number, part)| { (format!("{layer}.{part}_proj.bias"), Change::third(number)) })
            .collect::<Vec<_>>()
    );
    assert_eq!(
        keys("transformer.resblocks.7.mlp.c_proj.weight"),
        [(
            "text_model.encoder.layers.7.mlp.fc2.weight".to_owned(),
            Change::None
        )]
    );
    assert_eq!(
        keys("text_projection"),
        [("text_projection.weight".to_owned(), Change::Transpose)]
    );
    assert_eq!(
        keys("text_projection.weight"),
        [("text_projection.weight".to_owned(), Change::None)]
    );
    assert_eq!(open_clip_keys("visual.proj"), None);
    assert_eq!(
        open_clip_keys("transformer.resblocks.7.attn.in_proj_x"),
        None
    );
}

/// The inverse maps every layer of a U-Net to itself.
#[test]
fn original_names_are_the_inverse() {
    use burn::tensor::{Device, FloatDType};

    let golden =
        std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/golden");
    for (folder, layers) in [("unet_sd15", 2), ("unet_sdxl", 1), ("sd21/unet", 1)] {
        let open = crate::weights::Weights::open;
        let weights = open(&golden.join(folder), &Device::flex(), FloatDType::F32).unwrap();
        let names = OriginalNames::of(weights.keys());
        for key in weights.keys() {
            let (layer, kind) = key.rsplit_once('.').unwrap();
            let original = names.get(layer).unwrap_or_else(|| panic!("{layer}"));
            let back = unet_key(&format!("{original}.{kind}"), layers);
            assert_eq!(back.as_deref(), Some(key), "{original}");
        }
    }
    assert_eq!(
        OriginalNames::default().get("up_blocks.0.upsamplers.0.conv"),
        None
    );
}
