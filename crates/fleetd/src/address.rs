//! Who this machine is: its ID, and the address others reach it by.
use fleet_cluster::model::MachineId;
use std::{
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where systemd keeps the ID of the machine, machine-id(5).
pub const MACHINE_ID_FILE: &str = "/etc/machine-id";

/// Why there is no machine ID; fleetd can't run without.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unable to determine local machine ID: {file} {reason}. Every machine of a cluster needs an ID of its own: \
     systemd-machine-id-setup makes one (remove the file first if it has a wrong one)",
    file = .file.display()
)]
pub struct NoMachineId {
    file: PathBuf,
    reason: String,
}

/// Reads the ID of this machine.
pub fn machine_id(file: &Path) -> Result<MachineId, NoMachineId> {
    let error = |reason: String| NoMachineId { file: file.to_owned(), reason };
    let mut text = String::new();
    std::fs::File::open(file).and_then(|file| file.take(4096).read_to_string(&mut text)).map_err(
        |e| match e.kind() {
            io::ErrorKind::NotFound => error("does not exist".into()),
            _ => error(format!("can't be read: {e}")),
        },
    )?;
    match text.trim() {
        "" => Err(error("is empty".into())),
        // What systemd writes into an image until its first boot.
        "uninitialized" => Err(error("says uninitialized".into())),
        text => match MachineId::parse(text) {
            Ok(id) if id.as_str().bytes().all(|b| b == b'0') => Err(error("holds only zeros".into())),
            Ok(id) => Ok(id),
            Err(e) => Err(error(format!("is wrong: {e}"))),
        },
    }
}

/// The address this machine is to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The address; empty when there is none.
    pub address: String,
    /// What the user should know of how it was found.
    pub warning: Option<String>,
}

/// What the kernel knows of our addresses.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The source address of packets to the IPv4 Internet.
    routed4: Option<Ipv4Addr>,
    /// The same for IPv6.
    routed6: Option<Ipv6Addr>,
    /// /proc/net/fib_trie
    fib_trie: String,
    /// /proc/net/if_inet6
    if_inet6: String,
}

/// Finds the address of this machine as the original did: that of the interface with the default route, IPv4
/// before IPv6. Without a default route any address that is not only for this machine or its link will do.
pub fn published() -> Published {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    // Addresses for documentation: they are reached through the default route and nowhere else.
    let routed = |bind: &str, to: &str| routed(bind.parse().ok()?, to.parse().ok()?).ok();
    let known = Known {
        routed4: routed("0.0.0.0:0", "192.0.2.1:9").and_then(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        }),
        routed6: routed("[::]:0", "[2001:db8::1]:9").and_then(|ip| match ip {
            IpAddr::V6(ip) => Some(ip),
            IpAddr::V4(_) => None,
        }),
        fib_trie: read("/proc/net/fib_trie"),
        if_inet6: read("/proc/net/if_inet6"),
    };
    choose(&known)
}

/// The source address the kernel would take. Connecting a UDP socket asks the routing table and sends nothing.
fn routed(bind: SocketAddr, to: SocketAddr) -> io::Result<IpAddr> {
    let socket = UdpSocket::bind(bind)?;
    socket.connect(to)?;
    socket.local_addr().map(|address| address.ip())
}

fn choose(known: &Known) -> Published {
    let routed = known
        .routed4
        .filter(global4)
        .map(IpAddr::from)
        .or_else(|| known.routed6.filter(global6).map(IpAddr::from));
    if let Some(address) = routed {
        return Published { address: address.to_string(), warning: None };
    }
    let any = local4(&known.fib_trie)
        .into_iter()
        .find(global4)
        .map(IpAddr::from)
        .or_else(|| local6(&known.if_inet6).into_iter().find(global6).map(IpAddr::from));
    match any {
        Some(address) => Published {
            address: address.to_string(),
            warning: Some(format!(
                "there is no default route; this machine publishes its address {address} \
                 (public_ip in the configuration sets another)"
            )),
        },
        None => Published {
            address: String::new(),
            warning: Some(
                "this machine has no address to publish (public_ip in the configuration sets one)".to_owned(),
            ),
        },
    }
}

/// Whether others can reach it: Go's `IsGlobalUnicast`, which the original asked for.
fn global4(ip: &Ipv4Addr) -> bool {
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_link_local() || ip.is_multicast() || ip.is_broadcast())
}

fn global6(ip: &Ipv6Addr) -> bool {
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast())
}

/// The IPv4 addresses of this machine, in the order of their values.
fn local4(fib_trie: &str) -> Vec<Ipv4Addr> {
    let mut found = std::collections::BTreeSet::new();
    let mut leaf = None;
    for line in fib_trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = Ipv4Addr::from_str(address).ok();
        } else if line == "/32 host LOCAL" {
            found.extend(leaf);
        }
    }
    found.into_iter().collect()
}

/// The lasting IPv6 addresses of this machine, in the kernel's order.
fn local6(if_inet6: &str) -> Vec<Ipv6Addr> {
    /// IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE of linux/if_addr.h.
    const UNFIT: u8 = 0x01 | 0x08 | 0x20 | 0x40;
    if_inet6
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = u128::from_str_radix(words.next()?, 16).ok()?;
            let (scope, flags) = (words.nth(2)?, u8::from_str_radix(words.next()?, 16).ok()?);
            (scope == "00" && flags & UNFIT == 0).then(|| Ipv6Addr::from(address))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIB_TRIE: &str = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 172.30.7.0/24 2 0 2
        |-- 172.30.7.0
           /24 link UNICAST
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
        |-- 127.255.255.255
           /32 link BROADCAST
     +-- 169.254.0.0/16 2 0 2
        |-- 169.254.3.4
           /32 host LOCAL
     +-- 172.30.7.0/24 2 0 2
        |-- 172.30.7.13
           /32 host LOCAL
        |-- 172.30.7.255
           /32 link BROADCAST
";
    const IF_INET6: &str = "\
00000000000000000000000000000001 01 80 10 80       lo
fe80000000000000001122fffe334455 02 40 20 80     eth0
20010db8000000000000000000000bad 02 40 00 01     eth0
20010db8000000000000000000000042 02 40 00 80     eth0
";

    #[test]
    fn the_default_route_decides() {
        let known = Known {
            routed4: Some(Ipv4Addr::new(10, 1, 2, 3)),
            routed6: Some("2001:db8::7".parse().unwrap()),
            fib_trie: FIB_TRIE.into(),
            if_inet6: IF_INET6.into(),
        };
        assert_eq!(choose(&known), Published { address: "10.1.2.3".into(), warning: None });
        let known = Known { routed4: None, ..known };
        assert_eq!(choose(&known), Published { address: "2001:db8::7".into(), warning: None });
    }

    #[test]
    fn without_one_any_address_will_do() {
        let address = |known: &Known| {
            let published = choose(known);
            assert!(published.warning.unwrap().contains("public_ip"));
            published.address
        };
        let known = Known { fib_trie: FIB_TRIE.into(), if_inet6: IF_INET6.into(), ..Known::default() };
        assert_eq!(address(&known), "172.30.7.13");
        let known = Known { routed4: Some(Ipv4Addr::LOCALHOST), ..known };
        assert_eq!(address(&known), "172.30.7.13");
        let known = Known { fib_trie: String::new(), ..known };
        assert_eq!(address(&known), "2001:db8::42");
        assert_eq!(address(&Known::default()), "");
    }

    #[test]
    fn rubbish_is_no_address() {
        assert_eq!(local4("|-- x\n/32 host LOCAL\n/32 host LOCAL"), [] as [Ipv4Addr; 0]);
        assert_eq!(local6("x\n\n00 00\nzz 01 02 00 00 eth0"), [] as [Ipv6Addr; 0]);
    }

    #[test]
    fn what_the_kernel_says_can_be_read() {
        // Every network namespace has its loopback address once the interface is up.
        let fib_trie = std::fs::read_to_string("/proc/net/fib_trie").unwrap();
        assert!(local4(&fib_trie).contains(&Ipv4Addr::LOCALHOST));
        let published = published();
        assert_eq!(published.address.is_empty(), published.address.parse::<IpAddr>().is_err());
    }

    #[test]
    fn machine_ids() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("machine-id");
        let with = |text: &[u8]| {
            std::fs::write(&file, text).unwrap();
            machine_id(&file).map_err(|e| e.to_string())
        };
        let id = "c93b5f08e1ad47d2b6740e9f8a2d3c33";
        assert_eq!(with(format!("{id}\n").as_bytes()).unwrap().as_str(), id);
        for (text, reason) in [
            (&b""[..], "is empty"),
            (b"\n", "is empty"),
            (b"uninitialized\n", "says uninitialized"),
            (b"c93b\n", "is wrong: \"c93b\" is not a machine ID"),
            (b"00000000000000000000000000000000\n", "holds only zeros"),
            (b"\xff", "can't be read"),
        ] {
            let error = with(text).unwrap_err();
            assert!(error.starts_with("unable to determine local machine ID: "), "{error}");
            assert!(error.contains(&format!("machine-id {reason}")), "{error}");
            assert!(error.contains("systemd-machine-id-setup"), "{error}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(machine_id(&file).unwrap_err().to_string().contains("does not exist"));
    }
}
