//! Reading model weights and their configuration from disk.
