//! Measuring methods that make picture analogies: suites of analogies, methods, metrics, runs.

mod analogist;
mod analogy;
mod dia;
mod difference_inversion;
mod instruct_pix2pix;
mod method;
mod models;
mod settings;
mod visii;
mod words;

pub use self::analogist::{AnalogistConfig, Captioned};
pub use self::analogy::{Analogy, Attributes, Captions, SceneAttributes};
pub use self::dia::{DiaConfig, DiaInversion};
pub use self::instruct_pix2pix::InstructPix2PixConfig;
pub use self::method::{BUILT_IN, Build, BuiltIn, Method, Told, Variant, build};
pub use self::models::{EvalModelPaths, EvalModels};
pub use self::settings::with_settings;
pub use self::visii::{Keep, VisiiConfig};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tiny;
