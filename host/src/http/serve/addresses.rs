//! How many connections an address has. One with an IPv6 address has its /64 of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::keys::counted_as;

/// Counts connections against their bound.
#[derive(Debug, Clone)]
pub struct Addresses(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    max: usize,
    /// This machine's own are most often a proxy's, through which everybody comes.
    count_loopback: bool,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// The right to be connected. Dropping it makes room.
#[derive(Debug)]
pub struct Connected {
    counts: Arc<Counts>,
    /// `None`: not counted.
    address: Option<IpAddr>,
}

impl Addresses {
    /// `max` from each; 0: any number.
    pub fn new(max: usize, count_loopback: bool) -> Addresses {
        Addresses(Arc::new(Counts { max, count_loopback, open: Mutex::default() }))
    }

    /// Room for one more from `address`.
    pub fn admit(&self, address: IpAddr) -> Option<Connected> {
        let counts = self.0.clone();
        let loopback = address.to_canonical().is_loopback();
        if counts.max == 0 || (loopback && !counts.count_loopback) {
            return Some(Connected { counts, address: None });
        }
        let address = counted_as(address);
        let mut open = counts.open.lock();
        let count = open.entry(address).or_insert(0);
        if *count >= counts.max {
            return None;
        }
        *count += 1;
        drop(open);
        Some(Connected { counts, address: Some(address) })
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let Some(address) = self.address else { return };
        let mut open = self.counts.open.lock();
        let count = open.get_mut(&address).expect("it was counted");
        *count -= 1;
        if *count == 0 {
            open.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_connections_and_its_neighbour_as_many_again() {
        let addresses = Addresses::new(2, false);
        let admit = |text: &str| addresses.admit(text.parse().unwrap());
        let (one, two) = (admit("192.0.2.1").unwrap(), admit("::ffff:192.0.2.1").unwrap());
        assert!(admit("192.0.2.1").is_none());
        let _other = admit("192.0.2.2").unwrap();
        drop(one);
        let three = admit("192.0.2.1").unwrap();
        assert!(admit("192.0.2.1").is_none());
        drop((two, three));
        let network = [admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap()];
        assert!(admit("2001:db8::3").is_none(), "one /64");
        drop(network);
        assert_eq!(addresses.0.open.lock().len(), 1, "nothing is left behind");
    }

    #[test]
    fn a_proxy_of_this_machine_is_not_counted_and_0_is_no_bound() {
        let addresses = Addresses::new(1, false);
        let all: Vec<_> = (0..10).map(|_| addresses.admit("127.0.0.1".parse().unwrap()).unwrap()).collect();
        assert!(all.iter().all(|one| one.address.is_none()));
        assert!(Addresses::new(0, true).admit("192.0.2.1".parse().unwrap()).is_some());
    }
}
