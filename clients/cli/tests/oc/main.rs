//! `oc` as a shell runs it, against a mesh without microVMs.

#![allow(clippy::unwrap_used)]

mod fake;

mod agents;
mod checkpoints;
mod commands;
mod doctor;
mod exec;
mod files;
mod ports;
mod previews;
mod terminal;
mod up;
mod watch;
