//! The gateway: the edge of the mesh. It authenticates callers, projects the contract onto REST, and passes gRPC
//! through, all on one port. It keeps nothing that a restart would lose, so any number of them may run.
//!
//! A request's way, in reading order: [`listener`] accepts it, by [`tls`] if there are certificates, [`app`] sends it to [`rest`] or [`grpc`], [`surface`]
//! says who may call what, [`auth`] who is calling, [`sandboxes`] which host a sandbox is on, and [`upstream`]
//! makes the call. [`preview`] passes requests on to ports of sandboxes. [`ws`] attaches WebSockets to sessions. [`exchange`] logs and counts requests. [`compat`] holds what
//! published clients expect and the contract cannot say.

pub mod allocator;
pub mod config;
pub mod run;

pub mod app;
pub mod listener;
pub mod tls;

pub mod auth;
pub mod sandboxes;
pub mod surface;
pub mod upstream;

pub mod compat;
pub mod grpc;
pub mod preview;
pub mod rest;
pub mod ws;

pub mod budget;
pub mod cors;
pub mod exchange;
pub mod failure;
pub mod pieces;
pub mod timer;
