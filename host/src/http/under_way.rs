//! What is under way on this host that costs more than a request should: uploads that are held in memory, exports that read whole tables. So many of an org,
//! and so many of all.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::problem::{Code, Problem};
use crate::ids::OrgId;

/// Counts what is under way.
pub struct UnderWay {
    what: &'static str,
    limit: &'static str,
    of_org_max: usize,
    max: usize,
    orgs: Mutex<HashMap<OrgId, OfOrg>>,
}

#[derive(Default)]
struct OfOrg {
    count: usize,
    line: Arc<tokio::sync::Mutex<()>>,
}

/// A place among what is under way; dropping it makes room.
pub struct Place {
    among: Arc<UnderWay>,
    org: OrgId,
    line: Arc<tokio::sync::Mutex<()>>,
}

impl UnderWay {
    /// At most `of_org_max` of an org and `max` of all. `what` says of what, to whoever finds no room, and `limit` the same to a program.
    pub fn new(what: &'static str, limit: &'static str, of_org_max: usize, max: usize) -> Arc<UnderWay> {
        Arc::new(UnderWay { what, limit, of_org_max, max, orgs: Mutex::default() })
    }

    /// A place, if there is one.
    pub fn begin(self: &Arc<Self>, org: &OrgId) -> Result<Place, Problem> {
        let mut orgs = self.orgs.lock();
        let full = |whose: &'static str, max: usize| {
            let detail = format!("this {whose} has as many {} under way as it may have at once; try again", self.what);
            Problem::new(Code::TooManyStreams, detail).over(whose, self.limit, max as f64)
        };
        if orgs.get(org).is_some_and(|of_org| of_org.count >= self.of_org_max) {
            return Err(full("org", self.of_org_max));
        }
        if orgs.values().map(|of_org| of_org.count).sum::<usize>() >= self.max {
            return Err(full("host", self.max));
        }
        let of_org = orgs.entry(org.clone()).or_default();
        of_org.count += 1;
        Ok(Place { among: self.clone(), org: org.clone(), line: of_org.line.clone() })
    }
}

impl Place {
    /// Waits until nothing else of the org goes on that has waited for the same.
    pub async fn alone(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.line.lock().await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut orgs = self.among.orgs.lock();
        if let Some(of_org) = orgs.get_mut(&self.org) {
            of_org.count -= 1;
            if of_org.count == 0 {
                orgs.remove(&self.org);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn o3_so_many_of_an_org_and_of_all_and_room_when_they_go() {
        let under_way = UnderWay::new("uploads", "uploads_max", 2, 3);
        let (a, b) = (OrgId::parse("a").unwrap(), OrgId::parse("b").unwrap());
        let of_a = [under_way.begin(&a).ok().unwrap(), under_way.begin(&a).ok().unwrap()];
        assert_eq!(under_way.begin(&a).err().unwrap().code(), Code::TooManyStreams);
        let of_b = under_way.begin(&b).ok().unwrap();
        assert_eq!(under_way.begin(&b).err().unwrap().code(), Code::TooManyStreams, "all together");
        drop(of_a);
        assert!(under_way.begin(&a).is_ok());
        drop(of_b);
        assert!(under_way.orgs.lock().is_empty(), "nothing is left behind");
    }

    #[test]
    fn o5_what_an_org_does_one_after_another_delays_no_other() {
        let under_way = UnderWay::new("uploads", "uploads_max", 2, 4);
        let [one, two, other] = ["a", "a", "b"].map(|org| under_way.begin(&OrgId::parse(org).unwrap()).ok().unwrap());
        let first = one.alone().now_or_never().unwrap();
        assert!(two.alone().now_or_never().is_none());
        assert!(other.alone().now_or_never().is_some());
        drop(first);
        assert!(two.alone().now_or_never().is_some());
    }
}
