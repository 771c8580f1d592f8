//! The microVM of one sandbox, from its create to the last file it leaves.
//!
//! ```text
//!                making                    claim
//!   (the pool) ─────────▶ pooled ─────────────────┐
//!                            │ evicted            ▼      activated
//!                            ▼               ┌ claiming ┐─────────▶ running
//!                          gone   starting ──┤          │              │
//!                                    │       └──────────┘              │ lost
//!                                    │ start failed: undone            ▼
//!                                    ├──────────────▶ deleting ◀──── failed
//!                                    │ delete            │ ▲           (any)
//!                                    └───────────────────┤ └── delete ── running
//!                                                        ▼
//!                                                       gone
//!
//!   running ── hibernate ──▶ hibernating ── asleep ──▶ hibernated ── wake ──▶ waking ──▶ running
//!      ▲                          │ not asleep             ▲ │ delete          │ not now
//!      └──────────────────────────┘                        │ └──▶ deleting     │
//!                                                          └───────────────────┘
//! ```
//!
//! A VM that waits in the pool belongs to the pool ([`crate::pool`]). From the create on there is one *task* per
//! sandbox ([`task`]) with one bounded queue. It alone moves the sandbox from phase to phase, starts and ends the
//! VM and writes its journal; everybody else holds a [handle](handle::Vm) and asks. What a request or event does in which phase
//! is decided by a pure function ([`decide`]). The phase is published on a `watch`: a caller that joins a start or
//! a deletion waits there, and may go away at any time without any effect on the VM.
//!
//! - **starting** covers a claim from the pool, a restore, a boot, and the adoption of a VM that an earlier agent
//!   left. If it fails, all of it is undone and the epoch may be created again.
//! - **running** is announced after the guest has answered, and after the journal says so.
//! - A running VM whose disk's writes find no room on the host is halted by its VMM and goes on when there is some
//!   ([`halt`]); it is running all the while, and its calls are refused.
//! - **hibernated** is a VM that sleeps ([`sleep`]), in one of two [tiers](tier). In the first one its process stands still
//!   with its memory, which is captured meanwhile; in the second only its disk and its stored memory are left. Either way
//!   nobody counts its memory or its place, and it survives the machine: what is not captured by then, by its disk. From the
//!   second one it goes to the object store, too, if its host is told so ([`shelves`]).
//! - **failed** is a VM that ran and was lost. Its process is ended; its sandbox is listed, with the reason, until
//!   it is deleted.
//! - **deleting** gives up a start in progress. The deletion is remembered ([`crate::tombstones`]) before
//!   anything is removed.

pub mod activity;
pub mod decide;
pub mod halt;
pub mod handle;
pub mod shelves;
pub mod sleep;
pub mod start;
pub mod task;
pub mod tier;
