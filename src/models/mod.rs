//! The frozen networks, each driven by its `config.json`.

pub mod layers;
