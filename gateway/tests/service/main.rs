//! The gateway as its callers see it: real sockets on both sides, an embedded store in a temporary directory, and
//! a scheduler and a host that are fakes in this process.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod agent_sessions;
mod checkpoints;
mod client;
mod http2;
mod mesh;
mod ports;
mod scheduler;
mod sessions;
mod websocket;

mod auth;
mod broken;
mod exec_rest;
mod file_urls;
mod grpc;
mod limits;
mod preview_bodies;
mod preview_changes;
mod previews;
mod process;
mod refused;
mod rest;
mod streams;
mod tls;
mod ws_cost;
mod ws_flow;
mod ws_handshake;
mod ws_protobuf;
mod ws_published;
mod ws_resume;
