//! The guest: PID 1 of a microVM.
//!
//! ```text
//!   kernel ─▶ /init (this) ── boot: mounts, overlay, root ─▶ port oc.guest, or vsock ─▶ sessions ─▶ gRPC
//!                                                                                ├ exec    commands, terminals
//!                                                                                ├ agents
//!                                                                                ├ files
//!                                                                                ├ ports
//!                                                                                └ guest   activate, quiesce
//! ```
//!
//! It is linked statically, runs on one thread (blocking file calls on others), and never ends: what fails before the
//! services answer is written to the console and powers the machine off, what fails later is an error of one call.

pub mod agents;
pub mod boot;
mod cancel;
pub mod children;
pub mod clock;
pub mod exec;
pub mod family;
pub mod files;
pub mod freeze;
mod host_keys;
pub mod identity;
pub mod network;
pub mod port;
pub mod ports;
pub mod refusal;
pub mod serve;
pub mod users;
pub mod vsock;
