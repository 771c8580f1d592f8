//! Links, addresses and routes of one namespace, by netlink.

use std::{io, net::IpAddr, os::fd::AsRawFd as _};

use fs_err::File;
use futures_util::TryStreamExt as _;
use rtnetlink::{
    AddressGetRequest, Error, Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    new_connection,
    packet_route::{
        address::{AddressAttribute, AddressFlags},
        link::{InfoData, InfoVeth, LinkAttribute},
    },
};
use tokio::{runtime::Handle as Runtime, task::AbortHandle};

use super::plan::Names;

/// Bytes of a packet on a link between namespaces: as many as there can be. What is too large for the world is found out by the host,
/// once it has been followed wherever it passed.
const MTU: u32 = 65_535;

/// The links of the namespace that it was opened in.
#[derive(Debug)]
pub struct Links {
    handle: Handle,
    task: AbortHandle,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Links {
    /// Those of this thread's namespace, for use on `runtime`.
    ///
    /// # Errors
    ///
    /// If there is no netlink.
    pub fn open(runtime: &Runtime) -> io::Result<Self> {
        let _entered = runtime.enter();
        let (connection, handle, _) = new_connection()?;
        let task = runtime.spawn(connection).abort_handle();
        Ok(Self { handle, task })
    }

    /// The index of the link called `name`, if there is one.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub async fn find(&self, name: &str) -> io::Result<Option<u32>> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match found {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(None),
            Err(error) => Err(failed(name, &error)),
        }
    }

    async fn index(&self, name: &str) -> io::Result<u32> {
        self.find(name)
            .await?
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no link {name}")))
    }

    /// The names of all links.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub async fn names(&self) -> io::Result<Vec<String>> {
        let mut links = self.handle.link().get().execute();
        let mut names = Vec::new();
        while let Some(link) = links.try_next().await.map_err(|error| failed("all", &error))? {
            names.extend(link.attributes.into_iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            }));
        }
        Ok(names)
    }

    /// All addresses.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub async fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        addresses(self.handle.address().get()).await
    }

    /// The addresses of the link called `name`, if there is one.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub async fn addresses_of(&self, name: &str) -> io::Result<Option<Vec<IpAddr>>> {
        let Some(index) = self.find(name).await? else { return Ok(None) };
        addresses(self.handle.address().get().set_link_index_filter(index)).await.map(Some)
    }

    /// Makes a pair of links: `name` here, `peer` in the namespace called `namespace`.
    ///
    /// # Errors
    ///
    /// If one of them is there already.
    pub async fn add_pair(&self, name: &str, peer: &str, namespace: &str) -> io::Result<()> {
        let file = File::open(Names::file(namespace))?;
        let other = LinkMessageBuilder::<LinkUnspec>::new().name(peer).mtu(MTU);
        let other = other.setns_by_fd(file.as_raw_fd()).build();
        let pair = LinkVeth::new(name, peer).mtu(MTU).set_info_data(InfoData::Veth(InfoVeth::Peer(other)));
        let pair = pair.build();
        self.handle.link().add(pair).execute().await.map_err(|error| failed(name, &error))
    }

    /// Has the link called `name`, which was made before, take packets as large as those of [`Links::add_pair`].
    ///
    /// # Errors
    ///
    /// If it does not take that.
    pub async fn widen(&self, name: &str) -> io::Result<()> {
        let wide = LinkMessageBuilder::<LinkUnspec>::new().index(self.index(name).await?).mtu(MTU);
        self.handle.link().set(wide.build()).execute().await.map_err(|error| failed(name, &error))
    }

    /// Removes the link called `name`, and its other end. Fine if there is none.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub async fn remove(&self, name: &str) -> io::Result<()> {
        let Some(index) = self.find(name).await? else { return Ok(()) };
        match self.handle.link().del(index).execute().await {
            // Its other end went with its namespace.
            Err(Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(()),
            removed => removed.map_err(|error| failed(name, &error)),
        }
    }

    /// Takes the link called `name` up, with these addresses, and this MAC if one is named.
    ///
    /// # Errors
    ///
    /// If it does not take them.
    pub async fn set_up(
        &self,
        name: &str,
        mac: Option<[u8; 6]>,
        addresses: &[(IpAddr, u8)],
    ) -> io::Result<()> {
        let index = self.index(name).await?;
        let mut up = LinkMessageBuilder::<LinkUnspec>::new().index(index).up();
        if let Some(mac) = mac {
            up = up.address(mac.to_vec());
        }
        self.handle.link().set(up.build()).execute().await.map_err(|error| failed(name, &error))?;
        for &(address, length) in addresses {
            let mut add = self.handle.address().add(index, address, length).replace();
            // Nobody else can have it.
            add.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            add.execute().await.map_err(|error| failed(&address.to_string(), &error))?;
        }
        Ok(())
    }

    /// Makes `gateway` the way to the world by the link called `name`.
    ///
    /// # Errors
    ///
    /// If it does not lead there.
    pub async fn route_by(&self, name: &str, gateway: IpAddr) -> io::Result<()> {
        let index = self.index(name).await?;
        let route = match gateway {
            IpAddr::V4(gateway) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .output_interface(index)
                .gateway(gateway)
                .build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .output_interface(index)
                .gateway(gateway)
                .build(),
        };
        self.handle.route().add(route).execute().await.map_err(|error| failed(&gateway.to_string(), &error))
    }

    /// Has it that `address` is at `mac` on the link called `name`, whatever anybody there says.
    ///
    /// # Errors
    ///
    /// If it does not take that.
    pub async fn pin(&self, name: &str, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let index = self.index(name).await?;
        let pin = self.handle.neighbours().add(index, address).link_layer_address(&mac);
        pin.execute().await.map_err(|error| failed(&address.to_string(), &error))
    }
}

async fn addresses(asked: AddressGetRequest) -> io::Result<Vec<IpAddr>> {
    let mut all = asked.execute();
    let mut addresses = Vec::new();
    while let Some(one) = all.try_next().await.map_err(|error| failed("addresses", &error))? {
        addresses.extend(one.attributes.into_iter().filter_map(|attribute| match attribute {
            AddressAttribute::Local(address) | AddressAttribute::Address(address) => Some(address),
            _ => None,
        }));
    }
    Ok(addresses)
}

fn failed(what: &str, error: &Error) -> io::Error {
    io::Error::other(format!("netlink: {what}: {error}"))
}
