//! The agent over a host in memory, which dies and comes back as its machine would.

#![allow(clippy::unwrap_used)]

mod world;

mod app;
mod churn;
mod crash;
mod data_plane;
mod hibernate;
mod lifecycle;
mod paused;
mod snapshots;
