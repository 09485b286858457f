//! The memory of an optimisation step through the U-Net, from the configuration only.

use std::path::Path;

use crate::Result;
use crate::models::denoiser::unet::UNetConfig;
use crate::models::denoiser::unet_blocks::TransformerOptions;
use crate::models::denoiser::{FLOAT, KERNELS, Memory};

/// Tensors of `positions × channels` that a transformer block keeps: the inputs of its three
/// normalisations, queries, keys and values, the prompt's queries, and values with gates (8).
const BLOCK: usize = 15;
/// Such tensors that are held in addition at the same time: gradients of values and gates.
const AT_WORK: usize = 16;

/// A residual block and the transformer after it.
struct Layer {
    channels: [usize; 2],
    positions: usize,
    /// Blocks of the transformer.
    blocks: usize,
}

impl Layer {
    /// Floats kept of its inside and of its input.
    fn kept(&self) -> usize {
        let [c_in, c] = self.channels;
        let transformer = if self.blocks > 0 {
            1 + BLOCK * self.blocks
        } else {
            0
        };
        self.positions * (c_in + c + transformer * c)
    }

    fn input(&self) -> usize {
        self.positions * self.channels[0]
    }

    fn at_work(&self) -> usize {
        let tensors = if self.blocks > 0 { AT_WORK } else { 4 };
        self.positions * self.channels[1] * tensors
    }
}

/// The blocks of one of a level's transformers, if it has them.
fn blocks_of(transformers: Option<&TransformerOptions>, number: usize) -> usize {
    transformers.map_or(0, |options| {
        options.layers.get(number).copied().unwrap_or(0)
    })
}

impl UNetConfig {
    /// The approximate peak of bytes that the activations of an optimisation step on the CPU take, for
    /// `rows` latents of `height` and `width` in one call of the network.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config), naming `path`, as for the network itself.
    pub fn step_bytes(
        &self,
        path: &Path,
        rows: usize,
        [height, width]: [usize; 2],
        memory: Memory,
    ) -> Result<u64> {
        let layers = self.layers(path, rows, [height, width])?;
        let kept = match memory {
            Memory::Normal => layers.iter().map(Layer::kept).sum::<usize>(),
            Memory::Low => {
                let inputs = layers.iter().map(Layer::input).sum::<usize>();
                inputs + layers.iter().map(Layer::kept).max().unwrap_or(0)
            }
        };
        let at_work = layers.iter().map(Layer::at_work).max().unwrap_or(0);
        Ok(((kept + at_work) * FLOAT + KERNELS) as u64)
    }

    /// The layers in the order in which they run, as the network is built.
    fn layers(&self, path: &Path, rows: usize, [height, width]: [usize; 2]) -> Result<Vec<Layer>> {
        let levels = self.levels(path)?;
        let positions = |level: usize| {
            let [height, width] = [height, width].map(|size| size.div_ceil(1 << level));
            rows * height * width
        };
        let mut layers = Vec::new();
        let mut c_in = self.block_out_channels[0];
        for (number, level) in levels.iter().enumerate() {
            for layer in 0..level.layers {
                layers.push(Layer {
                    channels: [c_in, level.channels],
                    positions: positions(number),
                    blocks: blocks_of(level.down_transformer.as_ref(), layer),
                });
                c_in = level.channels;
            }
        }
        if let Some(transformer) = self.mid_block(&levels) {
            let blocks = blocks_of(transformer.as_ref(), 0);
            layers.extend([blocks, 0].map(|blocks| Layer {
                channels: [c_in; 2],
                positions: positions(levels.len() - 1),
                blocks,
            }));
        }
        for (number, level) in levels.iter().enumerate().rev() {
            let above = levels[number.saturating_sub(1)].channels;
            for layer in 0..=level.layers {
                let skip = if layer == level.layers {
                    above
                } else {
                    level.channels
                };
                layers.push(Layer {
                    channels: [c_in + skip, level.channels],
                    positions: positions(number),
                    blocks: blocks_of(level.up_transformer.as_ref(), layer),
                });
                c_in = level.channels;
            }
        }
        Ok(layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_stable_diffusion_1() {
        let config = UNetConfig::default();
        let path = Path::new("unet/config.json");
        let layers = config.layers(path, 2, [64, 64]).unwrap();
        assert_eq!(layers.len(), 8 + 2 + 12);
        let channels: Vec<usize> = layers.iter().map(|layer| layer.channels[0]).collect();
        assert_eq!(channels[..8], [320, 320, 320, 640, 640, 1280, 1280, 1280]);
        assert_eq!(
            channels[10..],
            [
                2560, 2560, 2560, 2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640
            ]
        );
        let bytes = |size, memory| config.step_bytes(path, 2, [size, size], memory).unwrap();
        assert!(bytes(64, Memory::Normal) > 3 * bytes(32, Memory::Normal));
        assert!(bytes(64, Memory::Low) < bytes(64, Memory::Normal) / 2);
    }
}
