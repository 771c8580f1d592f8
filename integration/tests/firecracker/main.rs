//! The driver of Firecracker against the real binaries: every call that it makes, in every state, under the jailer.
//!
//! What a guest does is not tested here: these tests pass where guests make no progress. They are told to nobody but the driver's
//! own traits, and so are what a version of Firecracker that is new to us has to pass.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something is not as expected")]

mod bad;
mod huge;
mod jailed;
mod killed;
mod life;
mod lookalike;
mod suite;
