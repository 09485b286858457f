//! Small things that several rooms need.

pub mod digest;
pub mod machine;
pub mod vector;
