//! What an org may use and what it has used. Pure: the stores keep limits and meters and ask here what they mean; PostgreSQL's functions say the
//! same a second time, and one suite holds both to it.
//!
//! An operator sets an org's own limits; what it has none of is the host's. Meters stand in the one row of the org that every replica locks, so that a
//! limit holds over all of them together. Only what is limited is metered.

use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::clock::Timestamp;
use crate::limits::Limits;
use crate::store::{AgentUse, OrgUse};

/// Processor time is counted by the hour of the clock.
pub const WINDOW_MS: i64 = 3_600_000;

/// How often it is measured what an org has stored.
pub const MEASURED_EVERY_MS: u64 = 600_000;

/// The same of one that has stored as much as it may.
pub const FULL_MEASURED_EVERY_MS: u64 = 60_000;

/// What a turn takes beside its message, its reply and its events.
pub const TURN_BYTES: i64 = 512;

macro_rules! own_limits {
    ($($(#[$doc:meta])* $variant:ident $name:ident: $kind:ty, $text:literal;)*) => {
        /// A limit of an org.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum LimitName {
            $($(#[$doc])* $variant,)*
        }

        impl LimitName {
            /// All of them.
            pub const ALL: &[LimitName] = &[$(LimitName::$variant),*];

            /// As in answers and, with hyphens, on the command line.
            pub fn as_str(self) -> &'static str {
                match self { $(LimitName::$variant => $text,)* }
            }
        }

        /// An org's own limits; `None`: the host's.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
        pub struct OwnLimits {
            $($(#[$doc])* pub $name: Option<$kind>,)*
        }

        /// What an operator changes of them. `Some(None)`: back to the host's.
        #[derive(Debug, Clone, Copy, Default, PartialEq)]
        pub struct LimitsChange {
            $($(#[$doc])* pub $name: Option<Option<$kind>>,)*
        }

        impl OwnLimits {
            /// These after a change.
            #[must_use]
            pub fn with(self, change: &LimitsChange) -> OwnLimits {
                OwnLimits { $($name: change.$name.unwrap_or(self.$name),)* }
            }

            /// What differs from `after`: as it is here, and as it is there.
            pub fn differences(&self, after: &OwnLimits) -> (Map<String, Value>, Map<String, Value>) {
                let (mut from, mut to) = (Map::new(), Map::new());
                $(if self.$name != after.$name {
                    from.insert($text.to_owned(), json!(self.$name));
                    to.insert($text.to_owned(), json!(after.$name));
                })*
                (from, to)
            }
        }
    };
}

own_limits! {
    /// Messages a second, over time. 0: any number.
    SubmitsPerSecond submits_per_second: f64, "submits_per_second";
    /// Messages at once, after a pause.
    SubmitBurst submit_burst: u32, "submit_burst";
    /// Running turns.
    RunningMax running_max: u32, "running_max";
    /// Live turns, running ones included.
    QueueMax queue_max: u32, "queue_max";
    /// Milliseconds of guests' processor time an hour. 0: any number.
    CpuMsPerHour cpu_ms_per_hour: u64, "cpu_ms_per_hour";
    /// Bytes that may be stored. 0: any number.
    StorageBytesMax storage_bytes_max: u64, "storage_bytes_max";
}

/// The limits that meters are held against, as they are for an org.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quota {
    /// 0: any number.
    pub submits_per_second: f64,
    /// 0: as many as come in a second, one at least.
    pub submit_burst: u32,
    /// 0: any number.
    pub cpu_ms_per_hour: u64,
    /// 0: any number.
    pub storage_bytes_max: u64,
}

impl From<&Limits> for Quota {
    /// The host's, for orgs without their own.
    fn from(limits: &Limits) -> Quota {
        Quota {
            submits_per_second: limits.org_submits_per_second,
            submit_burst: limits.org_submit_burst,
            cpu_ms_per_hour: limits.org_cpu_ms_per_hour,
            storage_bytes_max: limits.org_storage_bytes_max,
        }
    }
}

impl Quota {
    /// Any number of anything.
    pub const NONE: Quota =
        Quota { submits_per_second: 0.0, submit_burst: 0, cpu_ms_per_hour: 0, storage_bytes_max: 0 };

    /// What holds for an org with limits of its own.
    #[must_use]
    pub fn narrowed(self, own: &OwnLimits) -> Quota {
        Quota {
            submits_per_second: own.submits_per_second.unwrap_or(self.submits_per_second),
            submit_burst: own.submit_burst.unwrap_or(self.submit_burst),
            cpu_ms_per_hour: own.cpu_ms_per_hour.unwrap_or(self.cpu_ms_per_hour),
            storage_bytes_max: own.storage_bytes_max.unwrap_or(self.storage_bytes_max),
        }
    }

    /// Tokens of a full bucket.
    pub fn burst(&self) -> f64 {
        let burst = if self.submit_burst == 0 { self.submits_per_second.ceil() } else { f64::from(self.submit_burst) };
        burst.max(1.0)
    }
}

/// What an org has used.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Meters {
    /// Tokens that were in the bucket, and when. `None`: it was never touched, and is full.
    pub bucket: Option<(f64, Timestamp)>,
    /// Processor time of its guests, in milliseconds, in the hour `cpu_hour`.
    pub cpu_ms: f64,
    /// Hours since 1970.
    pub cpu_hour: i64,
    /// What was stored when that was last measured.
    pub storage_bytes: u64,
}

/// Whose limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitOf {
    /// The org's, or the host's for every org.
    Org,
    /// One of its agents', in that agent's settings.
    Agent,
}

impl LimitOf {
    /// As in answers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            LimitOf::Org => "org",
            LimitOf::Agent => "agent",
        }
    }
}

/// A limit that is reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exceeded {
    /// Whose.
    pub of: LimitOf,
    /// Which.
    pub limit: LimitName,
    /// What it is.
    pub max: f64,
    /// When there is room again; `None`: not by waiting.
    pub wait_ms: Option<u64>,
}

impl Exceeded {
    /// The same of an agent.
    #[must_use]
    pub fn of_the_agent(self) -> Exceeded {
        Exceeded { of: LimitOf::Agent, ..self }
    }
}

impl Meters {
    /// Tokens in the bucket at `now`.
    pub fn tokens(&self, quota: &Quota, now: Timestamp) -> f64 {
        match self.bucket {
            None => quota.burst(),
            Some((tokens, at)) => {
                (tokens + now.since_ms(at) as f64 * quota.submits_per_second / 1_000.0).min(quota.burst())
            }
        }
    }

    /// Processor time of this hour.
    pub fn cpu_ms(&self, now: Timestamp) -> f64 {
        if self.cpu_hour == now.0.div_euclid(WINDOW_MS) { self.cpu_ms } else { 0.0 }
    }

    /// The limit that keeps a message out at `now`: an org's, unless somebody says otherwise.
    pub fn exceeded(&self, quota: &Quota, now: Timestamp) -> Option<Exceeded> {
        let cpu_max = quota.cpu_ms_per_hour as f64;
        if quota.cpu_ms_per_hour > 0 && self.cpu_ms(now) >= cpu_max {
            let wait_ms = Some(window_end(now).since_ms(now));
            return Some(Exceeded { of: LimitOf::Org, limit: LimitName::CpuMsPerHour, max: cpu_max, wait_ms });
        }
        self.no_room(quota, now)
    }

    /// The same of what only stores something and runs nothing: a conversation that is made before its first message.
    pub fn no_room(&self, quota: &Quota, now: Timestamp) -> Option<Exceeded> {
        if quota.storage_bytes_max > 0 && self.storage_bytes >= quota.storage_bytes_max {
            let (limit, max) = (LimitName::StorageBytesMax, quota.storage_bytes_max as f64);
            return Some(Exceeded { of: LimitOf::Org, limit, max, wait_ms: Some(FULL_MEASURED_EVERY_MS) });
        }
        let tokens = self.tokens(quota, now);
        if quota.submits_per_second > 0.0 && tokens < 1.0 {
            let wait_ms = Some(((1.0 - tokens) * 1_000.0 / quota.submits_per_second).ceil() as u64);
            let (limit, max) = (LimitName::SubmitsPerSecond, quota.submits_per_second);
            return Some(Exceeded { of: LimitOf::Org, limit, max, wait_ms });
        }
        None
    }

    /// Takes a message's token. `false`: nothing is metered.
    pub fn take_token(&mut self, quota: &Quota, now: Timestamp) -> bool {
        if quota.submits_per_second <= 0.0 {
            return false;
        }
        self.bucket = Some((self.tokens(quota, now) - 1.0, now));
        true
    }

    /// Adds what a turn has used. `false`: nothing is metered.
    pub fn use_cpu(&mut self, quota: &Quota, cpu_ms: f64, now: Timestamp) -> bool {
        if quota.cpu_ms_per_hour == 0 {
            return false;
        }
        self.cpu_ms = self.cpu_ms(now) + cpu_ms;
        self.cpu_hour = now.0.div_euclid(WINDOW_MS);
        true
    }
}

/// When the hour of `now` ends, and with it what was used of it.
pub fn window_end(now: Timestamp) -> Timestamp {
    Timestamp((now.0.div_euclid(WINDOW_MS) + 1) * WINDOW_MS)
}

/// How an org stands: what it may and what it has used of it.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Standing {
    /// What it may. `null`: any number.
    pub limits: Allowed,
    /// What it has used. `null`: nothing is metered where there is no limit.
    pub used: Used,
}

/// What an org may.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Allowed {
    /// Messages a second, over time.
    pub submits_per_second: Option<f64>,
    /// Messages at once, after a pause.
    pub submit_burst: Option<u32>,
    /// Running turns.
    pub running_max: u32,
    /// Live turns, running ones included.
    pub queue_max: u32,
    /// Milliseconds of guests' processor time in an hour of the clock.
    pub cpu_ms_per_hour: Option<u64>,
    /// Bytes that may be stored.
    pub storage_bytes_max: Option<u64>,
}

/// What an org has used.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Used {
    /// Running turns.
    pub running: u64,
    /// Live turns that wait.
    pub queued: u64,
    /// Messages that are taken right now.
    pub submits_left: Option<f64>,
    /// Milliseconds of guests' processor time in this hour.
    pub cpu_ms: Option<f64>,
    /// When this hour ends.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub cpu_resets_at: Option<Timestamp>,
    /// Bytes that are stored, as last measured: every ten minutes, and every minute while that is as much as may be.
    pub storage_bytes: Option<u64>,
}

impl Standing {
    /// Of an org on a host with these limits.
    pub fn of(org: &OrgUse, limits: &Limits) -> Standing {
        let quota = Quota::from(limits).narrowed(&org.own);
        let bound = |own: Option<u32>, host: usize| own.unwrap_or(u32::try_from(host).unwrap_or(u32::MAX));
        let (paced, timed) = (quota.submits_per_second > 0.0, quota.cpu_ms_per_hour > 0);
        let stored = quota.storage_bytes_max > 0;
        Standing {
            limits: Allowed {
                submits_per_second: paced.then_some(quota.submits_per_second),
                submit_burst: paced.then_some(quota.burst() as u32),
                running_max: bound(org.own.running_max, limits.org_running_max),
                queue_max: bound(org.own.queue_max, limits.org_queue_max),
                cpu_ms_per_hour: timed.then_some(quota.cpu_ms_per_hour),
                storage_bytes_max: stored.then_some(quota.storage_bytes_max),
            },
            used: Used {
                running: org.live.running,
                queued: org.live.waiting + org.live.ready,
                submits_left: paced.then(|| org.meters.tokens(&quota, org.at).floor()),
                cpu_ms: timed.then(|| org.meters.cpu_ms(org.at)),
                cpu_resets_at: timed.then(|| window_end(org.at)),
                storage_bytes: stored.then_some(org.meters.storage_bytes),
            },
        }
    }
}

/// How an agent stands: the limits in its settings, within its org's, and what it has used of them.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AgentStanding {
    /// What its settings let it. `null`: what the org may.
    pub limits: AgentAllowed,
    /// What it has used. `null`: nothing is counted where it has no limit.
    pub used: AgentUsed,
}

/// What an agent may.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AgentAllowed {
    /// Messages a second, over time.
    pub submits_per_second: Option<f64>,
    /// Messages at once, after a pause.
    pub submit_burst: Option<u32>,
    /// Running turns.
    pub running_max: Option<u32>,
    /// Live turns, running ones included.
    pub queue_max: Option<u32>,
    /// Milliseconds of guests' processor time in an hour of the clock.
    pub cpu_ms_per_hour: Option<u64>,
    /// Bytes that may be stored.
    pub storage_bytes_max: Option<u64>,
}

/// What an agent has used.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AgentUsed {
    /// Turns that run or may start at once.
    pub running: Option<u64>,
    /// Live turns that wait: behind others of their conversation, or for one of the agent's to end.
    pub queued: Option<u64>,
    /// Messages that are taken right now.
    pub submits_left: Option<f64>,
    /// Milliseconds of guests' processor time in this hour.
    pub cpu_ms: Option<f64>,
    /// When this hour ends.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub cpu_resets_at: Option<Timestamp>,
    /// Bytes that are stored, as last measured: every ten minutes, and every minute while that is as much as may be.
    pub storage_bytes: Option<u64>,
}

impl AgentStanding {
    /// Of an agent with these settings.
    pub fn of(own: &OwnLimits, used: Option<&AgentUse>) -> AgentStanding {
        let quota = Quota::NONE.narrowed(own);
        let (paced, timed) = (quota.submits_per_second > 0.0, quota.cpu_ms_per_hour > 0);
        let stored = quota.storage_bytes_max > 0;
        AgentStanding {
            limits: AgentAllowed {
                submits_per_second: own.submits_per_second,
                submit_burst: paced.then_some(quota.burst() as u32),
                running_max: own.running_max,
                queue_max: own.queue_max,
                cpu_ms_per_hour: own.cpu_ms_per_hour,
                storage_bytes_max: own.storage_bytes_max,
            },
            used: AgentUsed {
                running: used.map(|used| used.active),
                queued: used.map(|used| used.live.saturating_sub(used.active)),
                submits_left: used.filter(|_| paced).map(|used| used.meters.tokens(&quota, used.at).floor()),
                cpu_ms: used.filter(|_| timed).map(|used| used.meters.cpu_ms(used.at)),
                cpu_resets_at: used.filter(|_| timed).map(|used| window_end(used.at)),
                storage_bytes: used.filter(|_| stored).map(|used| used.meters.storage_bytes),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTA: Quota =
        Quota { submits_per_second: 2.0, submit_burst: 3, cpu_ms_per_hour: 100, storage_bytes_max: 1_000 };
    /// A quarter past an hour.
    const NOW: Timestamp = Timestamp(10 * WINDOW_MS + WINDOW_MS / 4);

    fn exceeded(limit: LimitName, max: f64, wait_ms: u64) -> Option<Exceeded> {
        Some(Exceeded { of: LimitOf::Org, limit, max, wait_ms: Some(wait_ms) })
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let mut meters = Meters::default();
        for left in [2.0, 1.0, 0.0] {
            assert_eq!(meters.exceeded(&QUOTA, NOW), None);
            assert!(meters.take_token(&QUOTA, NOW));
            assert_eq!(meters.tokens(&QUOTA, NOW), left);
        }
        assert_eq!(meters.exceeded(&QUOTA, NOW), exceeded(LimitName::SubmitsPerSecond, 2.0, 500));
        assert_eq!(meters.exceeded(&QUOTA, NOW.plus_ms(250)), exceeded(LimitName::SubmitsPerSecond, 2.0, 250));
        assert_eq!(meters.exceeded(&QUOTA, NOW.plus_ms(500)), None);
        assert_eq!(meters.tokens(&QUOTA, NOW.plus_ms(3_600_000)), 3.0, "it is never more than full");
        assert_eq!(meters.tokens(&QUOTA, Timestamp(NOW.0 - 5_000)), 0.0, "a clock that goes back gives nothing");
    }

    #[test]
    fn what_is_not_limited_is_not_metered() {
        let free = Quota::NONE;
        let mut meters =
            Meters { bucket: Some((0.0, NOW)), cpu_ms: 1e9, cpu_hour: NOW.0 / WINDOW_MS, storage_bytes: u64::MAX };
        let before = meters;
        assert_eq!(meters.exceeded(&free, NOW), None);
        assert!(!meters.take_token(&free, NOW) && !meters.use_cpu(&free, 5.0, NOW));
        assert_eq!(meters, before);
    }

    #[test]
    fn processor_time_is_given_back_at_the_hour() {
        let mut meters = Meters::default();
        assert!(meters.use_cpu(&QUOTA, 60.0, NOW) && meters.use_cpu(&QUOTA, 39.5, NOW));
        assert_eq!(meters.exceeded(&QUOTA, NOW), None);
        meters.use_cpu(&QUOTA, 0.5, NOW);
        assert_eq!(meters.exceeded(&QUOTA, NOW), exceeded(LimitName::CpuMsPerHour, 100.0, 2_700_000));
        let next = window_end(NOW);
        assert_eq!((meters.cpu_ms(next), meters.exceeded(&QUOTA, next)), (0.0, None));
        meters.use_cpu(&QUOTA, 1.0, next);
        assert_eq!(meters.cpu_ms(next), 1.0);
    }

    #[test]
    fn what_is_stored_is_bounded_until_it_is_measured_again() {
        let mut meters = Meters { storage_bytes: 999, ..Meters::default() };
        assert_eq!(meters.exceeded(&QUOTA, NOW), None);
        meters.storage_bytes = 1_000;
        assert_eq!(meters.exceeded(&QUOTA, NOW), exceeded(LimitName::StorageBytesMax, 1_000.0, FULL_MEASURED_EVERY_MS));
    }

    #[test]
    fn a_burst_is_a_seconds_worth_where_nobody_says_and_one_at_least() {
        for (submits_per_second, submit_burst, burst) in
            [(0.1, 0, 1.0), (2.5, 0, 3.0), (2.5, 1, 1.0), (0.5, 20, 20.0), (0.0, 0, 1.0)]
        {
            assert_eq!(Quota { submits_per_second, submit_burst, ..QUOTA }.burst(), burst);
        }
    }

    #[test]
    fn an_own_limit_goes_before_the_hosts_and_back() {
        let own = OwnLimits::default().with(&LimitsChange {
            submits_per_second: Some(Some(0.5)),
            queue_max: Some(Some(0)),
            ..Default::default()
        });
        assert_eq!(QUOTA.narrowed(&own), Quota { submits_per_second: 0.5, ..QUOTA });
        let back = own.with(&LimitsChange { submits_per_second: Some(None), ..Default::default() });
        assert_eq!(back, OwnLimits { queue_max: Some(0), ..Default::default() });
        let (from, to) = own.differences(&back);
        assert_eq!(
            (Value::from(from), Value::from(to)),
            (json!({"submits_per_second": 0.5}), json!({"submits_per_second": null}))
        );
    }
}
