//! Where the parts of the mesh listen by TCP: agents and schedulers, by their records, and the store. They do what whoever calls
//! them says, so no guest may reach them, whatever an operator has excepted from what is denied, and even where their addresses
//! are of the internet.

use std::{collections::BTreeSet, io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::join_all;
use oc_mesh::{
    endpoint::Endpoint,
    keys,
    store::{self, SharedStore},
    view::View,
};
use oc_proto::mesh::{HostRecord, SchedulerRecord};
use tokio::{
    net::lookup_host,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{app::AppError, backend::Backend};

/// How often it is looked at anyhow: names may lead elsewhere, and what failed is tried again.
const ANEW: Duration = Duration::from_secs(10);
/// How long a name may take to be found.
const FOUND_WITHIN: Duration = Duration::from_secs(2);

/// What guests are kept from.
#[derive(Debug)]
pub struct Seclusion {
    backend: Arc<dyn Backend>,
    /// The store's members, `host:port`.
    store: Vec<String>,
    hosts: View<HostRecord>,
    schedulers: View<SchedulerRecord>,
    /// All that guests are kept from since the agent has come up: who is no member at the moment may listen all the same.
    seen: BTreeSet<SocketAddr>,
    /// Names that nobody has found lately.
    lost: BTreeSet<String>,
}

impl Seclusion {
    /// Keeps guests from what is known by now of the mesh whose store is `store`, at `url`, and returns what goes on with that.
    ///
    /// # Errors
    ///
    /// If the store cannot be read, or guests cannot be kept from it.
    pub async fn begin(
        backend: Arc<dyn Backend>,
        store: SharedStore,
        url: &str,
        cancel: &CancellationToken,
    ) -> Result<Self, AppError> {
        let hosts = View::start(store.clone(), keys::HOSTS, cancel.clone()).await?;
        let schedulers = View::start(store, keys::SCHEDULERS, cancel.clone()).await?;
        let (store, seen, lost) = (store::members(url), BTreeSet::new(), BTreeSet::new());
        let mut seclusion = Self { backend, store, hosts, schedulers, seen, lost };
        seclusion.look().await?;
        Ok(seclusion)
    }

    /// Follows what joins, until `cancel`.
    pub async fn keep(self, cancel: CancellationToken) {
        cancel.run_until_cancelled_owned(self.follow()).await;
    }

    async fn follow(mut self) {
        let mut anew = interval(ANEW);
        anew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut hosts, mut schedulers) = (self.hosts.changes(), self.schedulers.changes());
        loop {
            // The first tick comes at once: what has joined since it was looked is seen by that.
            tokio::select! {
                () = hosts.next() => {}
                () = schedulers.next() => {}
                _ = anew.tick() => {}
            }
            if let Err(error) = self.look().await {
                warn!(%error, "guests may reach parts of the mesh that are new");
            }
        }
    }

    async fn look(&mut self) -> Result<(), AppError> {
        let looks = self.places().into_iter().map(async |place| {
            let found = timeout(FOUND_WITHIN, lookup_host(&place)).await;
            let found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            (found.map(Vec::from_iter), place)
        });
        let mut found = self.seen.clone();
        for (addresses, place) in join_all(looks).await {
            match addresses {
                Ok(addresses) => {
                    self.lost.remove(&place);
                    found.extend(addresses);
                }
                Err(error) => {
                    if self.lost.insert(place.clone()) {
                        warn!(place, %error, "guests may reach a part of the mesh that is not found");
                    }
                }
            }
        }
        if found != self.seen {
            self.backend.seclude(&found).await.map_err(AppError::Seclusion)?;
            self.seen = found;
        }
        Ok(())
    }

    /// Where somebody listens, `host:port`.
    fn places(&self) -> BTreeSet<String> {
        let hosts = self.hosts.all().into_iter().map(|(_, host)| host.endpoint.clone());
        let schedulers = self.schedulers.all().into_iter().map(|(_, scheduler)| scheduler.endpoint.clone());
        let places = hosts.chain(schedulers).filter_map(|endpoint| match endpoint.parse() {
            Ok(Endpoint::Tcp(place)) => Some(place),
            _ => None,
        });
        places.chain(self.store.iter().cloned()).collect()
    }
}
