//! LPIPS, a distance of pictures fitted to human perception
//! ([Zhang et al. 2018](https://arxiv.org/abs/1801.03924)), over VGG16
//! ([Simonyan and Zisserman 2014](https://arxiv.org/abs/1409.1556)).

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};

use crate::models::feature_map::Conv2d;
use crate::models::layers::Activation;
use crate::util::tensors::host;
use crate::weights::Weights;
use crate::{Error, Result};

/// The numbers of the convolutions of each of VGG16's blocks among its layers. Each is followed by
/// a ReLU, and every block except the first begins with 2 × 2 max pooling.
const BLOCKS: [&[usize]; 5] = [
    &[0, 2],
    &[5, 7],
    &[10, 12, 14],
    &[17, 19, 21],
    &[24, 26, 28],
];
/// The `lpips` package saves the weights of its last layers twice.
const TWICE: [&str; 1] = ["model.1.weight"];
/// The smallest side of a picture that allows all halvings.
pub const MIN_SIDE: usize = 16;

/// The `lpips` package's `LPIPS(net="vgg")`. Its weights are constants.
#[derive(Clone, Debug)]
pub struct Lpips {
    /// The mean and the standard deviation of pictures, [1, 3, 1, 1].
    shift: Tensor<4>,
    scale: Tensor<4>,
    blocks: Vec<Vec<Conv2d>>,
    /// The weight of each channel at the end of each block.
    weights: Vec<Vec<f32>>,
    device: Device,
}

impl Lpips {
    /// Reads the package's `state_dict()`, saved as safetensors.
    ///
    /// # Errors
    /// If the file is invalid; the error names it.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let weights = Weights::open(path, device, FloatDType::F32)?;
        let (mut blocks, mut lins) = (Vec::new(), Vec::new());
        let mut c_in = 3;
        for (number, layers) in BLOCKS.into_iter().enumerate() {
            let slice = weights.scope("net").scope(format!("slice{}", number + 1));
            let mut convs = Vec::with_capacity(layers.len());
            for layer in layers {
                let layer = slice.scope(layer);
                // The widths are the file's; a missing tensor is reported by its name.
                let c_out = layer.shape("weight").map_or(0, |shape| shape[0]);
                convs.push(Conv2d::load(&layer, [c_in, c_out], 3, 1, 1)?);
                c_in = c_out;
            }
            blocks.push(convs);
            let lin = weights.scope(format!("lin{number}.model.1"));
            lins.push(host(lin.tensor("weight", [1, c_in, 1, 1])?));
        }
        let scaling = weights.scope("scaling_layer");
        let lpips = Self {
            shift: scaling.tensor("shift", [1, 3, 1, 1])?,
            scale: scaling.tensor("scale", [1, 3, 1, 1])?,
            blocks,
            weights: lins,
            device: device.clone(),
        };
        weights.check_all_used(&TWICE)?;
        Ok(lpips)
    }

    /// The device of the computation.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The weight of each channel at the end of each block.
    pub fn channel_weights(&self) -> &[Vec<f32>] {
        &self.weights
    }

    /// The features at the end of each block.
    ///
    /// # Shapes
    /// `x`: `[b, 3, h, w]` in [−1, 1]; results `[b, h', w', channels]`.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] for a picture with a side shorter than [`MIN_SIDE`].
    pub fn features(&self, x: Tensor<4>) -> Result<Vec<Tensor<4>>> {
        let [_, _, h, w] = x.dims();
        if h.min(w) < MIN_SIDE {
            return Err(Error::invalid_input(format!(
                "LPIPS: expected pictures of {MIN_SIDE} × {MIN_SIDE} or more, found {w} × {h}"
            )));
        }
        let x = (x - self.shift.clone()) / self.scale.clone();
        let mut x = x.permute([0, 2, 3, 1]); // [b, h, w, 3]
        let mut features = Vec::with_capacity(self.blocks.len());
        for (number, convs) in self.blocks.iter().enumerate() {
            if number > 0 {
                x = halved(x);
            }
            for conv in convs {
                x = Activation::Relu.forward(conv.forward_channels_last(x));
            }
            features.push(x.clone());
        }
        Ok(features)
    }
}

/// 2 × 2 max pooling; an odd row or column at the end is ignored.
///
/// # Shapes
/// `[b, h, w, c]` to `[b, h / 2, w / 2, c]`
fn halved(x: Tensor<4>) -> Tensor<4> {
    let [b, h, w, c] = x.dims();
    let (h, w) = (h / 2, w / 2);
    let x = x.slice([0..b, 0..2 * h, 0..2 * w, 0..c]);
    let rows = x.reshape([b * h, 2, 2 * w, c]).max_dim(1); // [b · h, 1, 2 w, c]
    let columns = rows.reshape([b * h, w, 2, c]).max_dim(2); // [b · h, w, 1, c]
    columns.reshape([b, h, w, c])
}
