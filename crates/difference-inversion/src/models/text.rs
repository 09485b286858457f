//! Text towers and their tokenizers.

pub mod clip;
pub mod clip_text;
pub mod qwen3;
mod sentencepiece;
pub mod t5;
pub mod tokenizer;
pub mod tower;
