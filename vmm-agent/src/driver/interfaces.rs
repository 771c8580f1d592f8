//! Which VM has which network: taken for its VMM, given back when that has ended, and written in its home meanwhile.

use std::{collections::BTreeSet, io, net::SocketAddr, path::Path, sync::Arc};

use fs_err as fs;
use oc_mesh::handoff::Handoffs;

use super::{
    home::Home,
    ports::{Ports, Sockets},
    running,
};
use crate::{
    microvm::MakeError,
    network::{self, Egress, Interface, Limits, Network, Settings, Usage, namespace::Namespace, plan::Names},
};

/// The networks of one host's VMs.
#[derive(Clone, Debug)]
pub struct Interfaces {
    names: Names,
    /// What makes them; absent where VMs get none, or are only removed.
    network: Option<Arc<Network>>,
    sockets: Sockets,
}

fn failed(error: io::Error) -> MakeError {
    MakeError::Backend(format!("the VM's network: {error}"))
}

impl Interfaces {
    /// Those of the agent called `names`, which can be removed.
    pub fn for_removal(names: Names) -> Self {
        Self { names, network: None, sockets: Sockets::new(None) }
    }

    /// Readies them for the VMs in `homes`, or sees that none are made where there are no `settings`. Connections to their ports
    /// are handed over by `handoffs`, if at all.
    ///
    /// # Errors
    ///
    /// If this host does not permit.
    pub async fn open(
        names: Names,
        homes: &Path,
        settings: Option<Settings>,
        handoffs: Option<Handoffs>,
    ) -> io::Result<Self> {
        let used = used(&names, homes)?;
        let network = match settings {
            Some(settings) => Some(Network::open(names.clone(), settings, used).await?),
            None if used.is_empty() => {
                network::remove_all(&names).await?;
                None
            }
            None => {
                network::sweep(&names, &used).await?;
                None
            }
        };
        Ok(Self { names, network, sockets: Sockets::new(handoffs) })
    }

    /// Stops what makes them.
    pub async fn close(&self) {
        if let Some(network) = &self.network {
            network.close().await;
        }
    }

    /// Takes one for the VMM that is to be launched in `home`, if VMs have networks, and lets it reach what it may.
    ///
    /// # Errors
    ///
    /// [`MakeError::Backend`].
    pub async fn plug(&self, home: &Home) -> Result<Option<Interface>, MakeError> {
        let Some(network) = &self.network else { return Ok(None) };
        // Of a VMM that was launched before.
        self.unplug(home).await?;
        let limits = network.limits();
        let interface = network.take(|number| home.note_network(number, limits)).await.map_err(failed)?;
        let egress = home.egress().map_err(failed)?;
        if egress != Egress::Open {
            network.restrict(interface.number, egress).await.map_err(failed)?;
        }
        Ok(Some(interface))
    }

    /// Sets what the VM in `home` may reach, now and whenever it runs.
    ///
    /// # Errors
    ///
    /// [`MakeError::Backend`]: it must not run then.
    pub async fn restrict(&self, home: &Home, egress: Egress) -> Result<(), MakeError> {
        if home.egress().map_err(failed)? == egress {
            return Ok(());
        }
        let number = home.network().map_err(failed)?;
        let noted = running::on_disk(home, move |home| home.note_egress(egress));
        let set = async {
            match (&self.network, number) {
                (Some(network), Some(number)) => network.restrict(number, egress).await.map_err(failed),
                _ => Ok(()),
            }
        };
        tokio::try_join!(noted, set).map(drop)
    }

    /// What the VM in `home` has made of its network, and what it may; `None` if it has none.
    ///
    /// # Errors
    ///
    /// If it cannot be looked at.
    pub async fn usage(&self, home: &Home) -> io::Result<Option<(Usage, Limits)>> {
        let (Some(network), Some(number)) = (&self.network, home.network()?) else { return Ok(None) };
        let limits = home.network_limits()?.unwrap_or_else(|| network.limits());
        Ok(Some((network.usage(number).await?, limits)))
    }

    /// Has no VM reach these.
    ///
    /// # Errors
    ///
    /// If the host's packet filter does not take it.
    pub async fn seclude(&self, parts: &BTreeSet<SocketAddr>) -> io::Result<()> {
        match &self.network {
            Some(network) => network.seclude(parts).await,
            None => Ok(()),
        }
    }

    /// The ports of the VM in `home`, whose VMM is about to run or does; `None` if it has no network.
    ///
    /// # Errors
    ///
    /// [`MakeError::Backend`].
    pub fn ports(&self, home: &Home) -> Result<Option<Ports>, MakeError> {
        let Some(number) = home.network().map_err(failed)? else { return Ok(None) };
        let namespace = Namespace::open(&self.names.vm(number)).map_err(failed)?;
        Ok(Some(Ports::new(namespace, self.sockets.clone())))
    }

    /// Removes what the VM in `home` had, whose VMM has ended. Fine if there is nothing, or no home.
    ///
    /// # Errors
    ///
    /// [`MakeError::Backend`] if it resists.
    pub async fn unplug(&self, home: &Home) -> Result<(), MakeError> {
        let Some(number) = home.network().map_err(failed)? else { return Ok(()) };
        let removed = match &self.network {
            Some(network) => network.release(number).await,
            None => network::remove(&self.names, number).await,
        };
        removed.and_then(|()| home.forget_network()).map_err(failed)
    }

    /// Removes what belongs to no VM.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub async fn remove_all(&self) -> io::Result<()> {
        network::remove_all(&self.names).await
    }
}

/// The numbers of the namespaces that VMs have. What a home says of one that is not there, such as after another boot of the
/// machine, is forgotten: another VM may get that number.
fn used(names: &Names, homes: &Path) -> io::Result<BTreeSet<u32>> {
    let mut used = BTreeSet::new();
    let entries = match fs::read_dir(homes) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(used),
        entries => entries?,
    };
    for entry in entries {
        let home = Home::of(homes, &entry?.file_name().to_string_lossy());
        match home.network()? {
            Some(number) if network::has(names, number) => {
                used.insert(number);
            }
            _ => home.forget_network()?,
        }
    }
    Ok(used)
}
