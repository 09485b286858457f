//! Evaluation of methods that make picture analogies, on suites with or without known answers:
//! suites, methods, metrics, and the folder of results.

mod analogist;
mod analogy;
pub mod compare;
mod dia;
mod folder;
mod instruct_pix2pix;
mod judge;
mod lbfgs;
mod measures;
mod method;
pub mod metrics;
mod models;
mod ours;
pub mod report;
mod session;
mod settings;
pub mod statistics;
pub mod suite;
mod visii;
mod words;

pub use self::analogist::{AnalogistConfig, Captioned};
pub use self::analogy::{Analogy, Attributes, Captions, SceneAttributes};
pub use self::dia::{DiaConfig, DiaInversion};
pub use self::folder::{Folder, MethodRecord, ResultRecord, RunRecord, Status, SuiteRecord};
pub use self::instruct_pix2pix::InstructPix2PixConfig;
pub use self::judge::{Judge, Judged};
pub use self::measures::{Better, METRICS, MeasurePaths, Measures, Metric, Question, Scores};
pub use self::method::{BUILT_IN, Build, BuiltIn, Method, Told, Variant, build};
pub use self::models::{EvalModelPaths, EvalModels, TEXT_TO_IMAGE};
pub use self::session::Session;
pub use self::settings::with_settings;
pub use self::visii::{Keep, VisiiConfig};

#[cfg(test)]
#[allow(clippy::panic, reason = "a panic is a failed test")]
mod golden_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tiny;
