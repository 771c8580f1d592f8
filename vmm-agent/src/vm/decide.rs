//! What a sandbox's VM does next: a function of its phase and of what came in, and of nothing else.
//!
//! The task in [`super::task`] performs what is decided here and is the only one that does.

use crate::identity::Epoch;

/// Where a sandbox's VM is in its life. The diagram is at the top of [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Being made, claimed from the pool, or adopted after a restart of the agent.
    Starting,
    /// Its guest answers.
    Running,
    /// Being stored. Its guest is about to stand still, or does.
    Hibernating,
    /// Stored: it has no process.
    Hibernated,
    /// Being made to run again, from what is stored.
    Waking,
    /// Lost after it ran. Nothing but its record is left; it stays until it is deleted.
    Failed,
    /// Being taken down.
    Deleting,
    /// Nothing of it is left.
    Gone,
}

/// What can come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A create for `epoch`.
    Create {
        /// The caller's epoch.
        epoch: Epoch,
    },
    /// A delete for `epoch`.
    Delete {
        /// The caller's epoch.
        epoch: Epoch,
        /// Whether the caller asked for an idle VM only and this one was used since.
        used: bool,
    },
    /// A request to store it, for `epoch`.
    Hibernate {
        /// The caller's epoch.
        epoch: Epoch,
        /// Whether the caller asked for an idle VM only and this one was used since.
        used: bool,
    },
    /// A request to make it run again, for `epoch`.
    Wake {
        /// The caller's epoch.
        epoch: Epoch,
    },
    /// A request to take its state down, for `epoch`.
    Capture {
        /// The caller's epoch.
        epoch: Epoch,
    },
    /// It is stored.
    Stored,
    /// It cannot be stored; it runs on.
    NotStored,
    /// It runs again.
    Woken,
    /// It cannot be made to run again now; it stays stored.
    NotWoken,
    /// The start succeeded.
    Started,
    /// The start failed for good.
    StartFailed,
    /// The VMM's process ended, or the guest is beyond reach.
    Lost,
    /// Everything of the VM was removed.
    Removed,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Stay as it is; the caller waits until the phase is the one it wants.
    Join,
    /// Go to [`Phase::Running`]: write that down, then tell.
    Run,
    /// Go to [`Phase::Hibernating`]: store it.
    Hibernate,
    /// Go to [`Phase::Hibernated`]: nothing of it is left but what is stored.
    Sleep,
    /// Go to [`Phase::Waking`]: make it run again.
    Wake,
    /// Stay as it is, and take its state down.
    Capture,
    /// Go to [`Phase::Failed`]: end what is left of the VM, keep the record.
    Fail,
    /// Go to [`Phase::Deleting`]: give up a start in progress, remove everything, remember the epoch.
    Delete,
    /// Go to [`Phase::Deleting`] as if it never was: the epoch may be created again.
    Undo,
    /// Go to [`Phase::Gone`]: the task ends.
    End,
    /// Nothing to do.
    Ignore,
}

impl Transition {
    /// The phase after the transition.
    pub fn leads_to(self, from: Phase) -> Phase {
        match self {
            Self::Join | Self::Ignore | Self::Capture => from,
            Self::Run => Phase::Running,
            Self::Hibernate => Phase::Hibernating,
            Self::Sleep => Phase::Hibernated,
            Self::Wake => Phase::Waking,
            Self::Fail => Phase::Failed,
            Self::Delete | Self::Undo => Phase::Deleting,
            Self::End => Phase::Gone,
        }
    }
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The caller's view is older than the host's.
    #[error("epoch {given} is older than {held}, which this host holds")]
    StaleEpoch {
        /// What the caller gave.
        given: Epoch,
        /// What the host holds.
        held: Epoch,
    },
    /// A create for a later epoch: the VM of the earlier one has to go first.
    #[error("epoch {given} replaces {held}")]
    Overtaken {
        /// What the caller gave.
        given: Epoch,
        /// What the host holds.
        held: Epoch,
    },
    /// It is between two phases: the same request may succeed later.
    #[error("it is changing its state at the moment")]
    NotReady,
    /// It was used since the time that the caller named.
    #[error("it was used in the meantime")]
    Active,
    /// It is being deleted, or was.
    #[error("it is deleted")]
    Deleted,
    /// It ran and was lost.
    #[error("its microVM is lost")]
    Failed,
}

/// Decides what an input does to a VM of epoch `held` in `phase`.
///
/// # Errors
///
/// [`Denied`], for requests only: events are never denied.
pub fn decide(phase: Phase, held: Epoch, input: Input) -> Result<Transition, Denied> {
    let only_in = |expected, transition| Ok(if phase == expected { transition } else { Transition::Ignore });
    match input {
        Input::Create { epoch }
        | Input::Delete { epoch, .. }
        | Input::Hibernate { epoch, .. }
        | Input::Wake { epoch }
        | Input::Capture { epoch }
            if epoch < held =>
        {
            Err(Denied::StaleEpoch { given: epoch, held })
        }
        Input::Create { epoch }
        | Input::Hibernate { epoch, .. }
        | Input::Wake { epoch }
        | Input::Capture { epoch }
            if epoch > held =>
        {
            Err(Denied::Overtaken { given: epoch, held })
        }
        Input::Create { .. } => match phase {
            // One that is stored was made: the caller is told late.
            Phase::Starting | Phase::Running | Phase::Hibernating | Phase::Hibernated | Phase::Waking => {
                Ok(Transition::Join)
            }
            Phase::Failed => Err(Denied::Failed),
            Phase::Deleting | Phase::Gone => Err(Denied::Deleted),
        },
        Input::Delete { used, .. } => match phase {
            Phase::Starting | Phase::Running if used => Err(Denied::Active),
            Phase::Starting
            | Phase::Running
            | Phase::Hibernating
            | Phase::Hibernated
            | Phase::Waking
            | Phase::Failed => Ok(Transition::Delete),
            Phase::Deleting | Phase::Gone => Ok(Transition::Join),
        },
        Input::Hibernate { used, .. } => match phase {
            Phase::Running if used => Err(Denied::Active),
            Phase::Running => Ok(Transition::Hibernate),
            Phase::Hibernating | Phase::Hibernated => Ok(Transition::Join),
            Phase::Starting | Phase::Waking => Err(Denied::NotReady),
            Phase::Failed => Err(Denied::Failed),
            Phase::Deleting | Phase::Gone => Err(Denied::Deleted),
        },
        Input::Wake { .. } => match phase {
            Phase::Hibernated => Ok(Transition::Wake),
            Phase::Starting | Phase::Running | Phase::Waking => Ok(Transition::Join),
            Phase::Hibernating => Err(Denied::NotReady),
            Phase::Failed => Err(Denied::Failed),
            Phase::Deleting | Phase::Gone => Err(Denied::Deleted),
        },
        Input::Capture { .. } => match phase {
            Phase::Running => Ok(Transition::Capture),
            Phase::Starting | Phase::Hibernating | Phase::Hibernated | Phase::Waking => Err(Denied::NotReady),
            Phase::Failed => Err(Denied::Failed),
            Phase::Deleting | Phase::Gone => Err(Denied::Deleted),
        },
        Input::Started => only_in(Phase::Starting, Transition::Run),
        Input::StartFailed => only_in(Phase::Starting, Transition::Undo),
        Input::Stored => only_in(Phase::Hibernating, Transition::Sleep),
        Input::NotStored => only_in(Phase::Hibernating, Transition::Run),
        Input::Woken => only_in(Phase::Waking, Transition::Run),
        Input::NotWoken => only_in(Phase::Waking, Transition::Sleep),
        Input::Lost => Ok(match phase {
            // A start that loses its VM says so by `StartFailed`; an adopted VM that is gone did run before.
            Phase::Starting | Phase::Running | Phase::Hibernating | Phase::Waking => Transition::Fail,
            Phase::Hibernated | Phase::Failed | Phase::Deleting | Phase::Gone => Transition::Ignore,
        }),
        Input::Removed => only_in(Phase::Deleting, Transition::End),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn phases() -> impl Strategy<Value = Phase> {
        prop_oneof![
            Just(Phase::Starting),
            Just(Phase::Running),
            Just(Phase::Hibernating),
            Just(Phase::Hibernated),
            Just(Phase::Waking),
            Just(Phase::Failed),
            Just(Phase::Deleting),
            Just(Phase::Gone),
        ]
    }

    fn inputs() -> impl Strategy<Value = Input> {
        let epochs = || (0..4_u64).prop_map(Epoch);
        prop_oneof![
            epochs().prop_map(|epoch| Input::Create { epoch }),
            (epochs(), any::<bool>()).prop_map(|(epoch, used)| Input::Delete { epoch, used }),
            (epochs(), any::<bool>()).prop_map(|(epoch, used)| Input::Hibernate { epoch, used }),
            epochs().prop_map(|epoch| Input::Wake { epoch }),
            epochs().prop_map(|epoch| Input::Capture { epoch }),
            Just(Input::Stored),
            Just(Input::NotStored),
            Just(Input::Woken),
            Just(Input::NotWoken),
            Just(Input::Started),
            Just(Input::StartFailed),
            Just(Input::Lost),
            Just(Input::Removed),
        ]
    }

    const HELD: Epoch = Epoch(2);

    /// Plays `inputs` from a start; returns every phase that was entered.
    fn play(inputs: &[Input]) -> Vec<Phase> {
        let mut phases = vec![Phase::Starting];
        for input in inputs {
            let phase = *phases.last().unwrap();
            if let Ok(transition) = decide(phase, HELD, *input) {
                phases.push(transition.leads_to(phase));
            }
        }
        phases
    }

    fn rank(phase: Phase) -> u8 {
        match phase {
            Phase::Starting => 0,
            // Back and forth.
            Phase::Running | Phase::Hibernating | Phase::Hibernated | Phase::Waking => 1,
            Phase::Failed => 2,
            Phase::Deleting => 3,
            Phase::Gone => 4,
        }
    }

    proptest! {
        #[test]
        fn a_life_only_goes_forward(inputs in prop::collection::vec(inputs(), 0..40)) {
            prop_assert!(play(&inputs).is_sorted_by_key(|&phase| rank(phase)));
        }

        #[test]
        fn what_ends_was_taken_down(inputs in prop::collection::vec(inputs(), 0..40)) {
            let phases = play(&inputs);
            prop_assert!(!phases.contains(&Phase::Gone) || phases.contains(&Phase::Deleting));
        }

        #[test]
        fn an_older_epoch_is_refused_in_every_phase(phase in phases(), epoch in 0..2_u64, used: bool) {
            let epoch = Epoch(epoch);
            for input in [
                Input::Create { epoch },
                Input::Delete { epoch, used },
                Input::Hibernate { epoch, used },
                Input::Wake { epoch },
                Input::Capture { epoch },
            ] {
                prop_assert_eq!(decide(phase, HELD, input), Err(Denied::StaleEpoch { given: epoch, held: HELD }));
            }
        }

        #[test]
        fn a_repeated_request_changes_nothing(phase in phases(), input in inputs()) {
            if let Ok(first) = decide(phase, HELD, input) {
                let after = first.leads_to(phase);
                if let Ok(second) = decide(after, HELD, input) {
                    prop_assert_eq!(second.leads_to(after), after);
                }
            }
        }

        #[test]
        fn a_delete_takes_any_idle_vm_down(phase in phases(), epoch in 2..4_u64) {
            let input = Input::Delete { epoch: Epoch(epoch), used: false };
            let after = decide(phase, HELD, input).unwrap().leads_to(phase);
            prop_assert!(matches!(after, Phase::Deleting | Phase::Gone));
        }

        #[test]
        fn events_are_never_denied(phase in phases(), input in inputs()) {
            let is_request = matches!(
                input,
                Input::Create { .. }
                    | Input::Delete { .. }
                    | Input::Hibernate { .. }
                    | Input::Wake { .. }
                    | Input::Capture { .. }
            );
            if !is_request {
                prop_assert!(decide(phase, HELD, input).is_ok());
            }
        }
    }

    #[test]
    fn only_one_that_runs_is_stored_and_only_a_stored_one_is_woken() {
        let hibernate = Input::Hibernate { epoch: HELD, used: false };
        let wake = Input::Wake { epoch: HELD };
        assert_eq!(decide(Phase::Running, HELD, hibernate), Ok(Transition::Hibernate));
        assert_eq!(decide(Phase::Hibernated, HELD, hibernate), Ok(Transition::Join));
        assert_eq!(decide(Phase::Waking, HELD, hibernate), Err(Denied::NotReady));
        assert_eq!(decide(Phase::Hibernated, HELD, wake), Ok(Transition::Wake));
        assert_eq!(decide(Phase::Waking, HELD, wake), Ok(Transition::Join));
        assert_eq!(decide(Phase::Hibernating, HELD, wake), Err(Denied::NotReady));
        // What fails leads back to where it began.
        assert_eq!(decide(Phase::Hibernating, HELD, Input::NotStored), Ok(Transition::Run));
        assert_eq!(decide(Phase::Waking, HELD, Input::NotWoken), Ok(Transition::Sleep));
    }

    #[test]
    fn only_one_that_runs_is_captured() {
        let capture = Input::Capture { epoch: HELD };
        assert_eq!(decide(Phase::Running, HELD, capture), Ok(Transition::Capture));
        assert_eq!(decide(Phase::Hibernated, HELD, capture), Err(Denied::NotReady));
        assert_eq!(decide(Phase::Deleting, HELD, capture), Err(Denied::Deleted));
    }

    #[test]
    fn a_vm_in_use_is_spared() {
        let input = Input::Hibernate { epoch: HELD, used: true };
        assert_eq!(decide(Phase::Running, HELD, input), Err(Denied::Active));
        let input = Input::Delete { epoch: HELD, used: true };
        assert_eq!(decide(Phase::Running, HELD, input), Err(Denied::Active));
        assert_eq!(decide(Phase::Failed, HELD, input), Ok(Transition::Delete));
    }

    #[test]
    fn a_failed_start_may_be_tried_again_and_a_delete_may_not() {
        assert_eq!(decide(Phase::Starting, HELD, Input::StartFailed), Ok(Transition::Undo));
        let input = Input::Delete { epoch: HELD, used: false };
        assert_eq!(decide(Phase::Starting, HELD, input), Ok(Transition::Delete));
    }

    #[test]
    fn a_create_of_a_later_epoch_names_what_it_replaces() {
        let given = Epoch(3);
        assert_eq!(
            decide(Phase::Running, HELD, Input::Create { epoch: given }),
            Err(Denied::Overtaken { given, held: HELD })
        );
    }
}
