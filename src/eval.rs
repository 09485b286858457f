//! Measuring methods that make picture analogies: suites of analogies, methods, metrics, runs.

mod analogy;
mod difference_inversion;
mod method;
mod models;
mod settings;
mod words;

pub use self::analogy::{Analogy, Attributes, Captions, SceneAttributes};
pub use self::method::{BUILT_IN, Build, BuiltIn, Method, Told, Variant, build};
pub use self::models::{EvalModelPaths, EvalModels};
pub use self::settings::with_settings;
