//! Named tests that share what is costly to make, and that is ended whatever becomes of them.

use std::{
    any::Any,
    fmt::Debug,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
};

use futures_util::future::LocalBoxFuture;
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

/// A [`Suite`] of functions by the modules they stand in, each test called as its function.
#[macro_export]
macro_rules! suite {
    ($($module:ident: $($test:ident),+;)+) => {
        $crate::suite::Suite::default()$($(.test(stringify!($test), $module::$test))+)+
    };
}

/// Tests of one `T`, in the order in which they are listed.
pub struct Suite<T> {
    trials: Vec<(&'static str, Body<T>)>,
    one_at_a_time: bool,
}

type Body<T> = Box<dyn Fn(Arc<T>) -> LocalBoxFuture<'static, anyhow::Result<()>> + Send + Sync>;

impl<T> Debug for Suite<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_list().entries(self.trials.iter().map(|(name, _)| name)).finish()
    }
}

impl<T> Default for Suite<T> {
    fn default() -> Self {
        Self { trials: Vec::new(), one_at_a_time: false }
    }
}

impl<T: Send + Sync + 'static> Suite<T> {
    /// Adds a test.
    #[must_use]
    pub fn test<F>(mut self, name: &'static str, body: impl Fn(Arc<T>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + 'static,
    {
        self.trials.push((name, Box::new(move |shared| Box::pin(body(shared)))));
        self
    }

    /// For tests that each want the whole machine.
    #[must_use]
    pub fn one_at_a_time(mut self) -> Self {
        self.one_at_a_time = true;
        self
    }

    /// Runs the tests that the command line selects, on what `begin` makes, and then `end`, whose failure is one too.
    pub fn run(
        self,
        begin: impl FnOnce() -> anyhow::Result<T>,
        end: impl FnOnce(T) -> anyhow::Result<()>,
    ) -> ExitCode {
        let mut arguments = Arguments::from_args();
        if self.one_at_a_time {
            arguments.test_threads = Some(1);
        }
        if arguments.list {
            let named = self.trials.into_iter().map(|(name, _)| Trial::test(name, || Ok(())));
            return libtest_mimic::run(&arguments, named.collect()).exit_code();
        }
        let (runtime, shared) =
            match Runtime::new().map_err(anyhow::Error::from).and_then(|runtime| Ok((runtime, begin()?))) {
                Ok((runtime, shared)) => (Arc::new(runtime), Arc::new(shared)),
                Err(error) => {
                    eprintln!("cannot begin: {error:#}");
                    return ExitCode::FAILURE;
                }
            };
        let trials = self.trials.into_iter().map(|(name, body)| {
            let (runtime, shared) = (Arc::clone(&runtime), Arc::clone(&shared));
            Trial::test(name, move || {
                let done = catch_unwind(AssertUnwindSafe(|| runtime.block_on(body(shared))));
                let failure = match done {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(error)) => format!("{error:#}"),
                    Err(panic) => said(panic.as_ref()),
                };
                // At once as well: a run that is cut off, or whose report is, has told it then.
                eprintln!("{name}: {failure}");
                Err(Failed::from(failure))
            })
        });
        let conclusion = libtest_mimic::run(&arguments, trials.collect());
        let ended = Arc::into_inner(shared)
            .ok_or_else(|| anyhow::anyhow!("a test still uses what the suite shares"))
            .and_then(end);
        match ended {
            Ok(()) => conclusion.exit_code(),
            Err(error) => {
                eprintln!("cannot end: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
    text.unwrap_or("it panicked").to_owned()
}
