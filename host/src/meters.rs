//! What guests used and what orgs were refused, as metrics by org and agent. A series' handles are looked up once: every turn that ends comes through here, on the journal's thread.

use std::sync::OnceLock;

use dashmap::{DashMap, DashSet};
use metrics::{Counter, Gauge};

use crate::ids::{AgentId, OrgId};
use crate::quota::{LimitName, LimitOf};
use crate::turn::Usage;

/// So many orgs and agents are told apart: a host and whoever asks it for metrics pay for each, and tenants make as many as they like.
const TOLD_APART: usize = 2_000;
/// As what the others are counted. No id begins like this.
const THE_REST: &str = "_other";

/// The series of the orgs and agents that have had a turn since the start, of the first ones by name.
#[derive(Default)]
pub struct Meters {
    named: DashMap<(OrgId, AgentId), Series>,
    rest: OnceLock<Series>,
    /// The first orgs that were refused something.
    refused: DashSet<OrgId>,
}

struct Series {
    cpu_us: Counter,
    instance_us: Counter,
    bytes_in: Counter,
    bytes_out: Counter,
    host_calls: Counter,
    memory_peak: Gauge,
}

impl Meters {
    /// A turn has ended.
    pub fn add(&self, org: &OrgId, agent: &AgentId, usage: &Usage) {
        let key = (org.clone(), agent.clone());
        if let Some(series) = self.named.get(&key) {
            return series.add(usage);
        }
        if self.named.len() < TOLD_APART {
            let series = self.named.entry(key).or_insert_with(|| Series::of(org.as_str(), agent.as_str()));
            return series.add(usage);
        }
        self.rest.get_or_init(|| Series::of(THE_REST, THE_REST)).add(usage);
    }

    /// A message, or a new conversation, was over a limit of its org or of its agent.
    pub fn refused(&self, org: &OrgId, (of, limit): (LimitOf, LimitName)) {
        if self.refused.len() < TOLD_APART {
            self.refused.insert(org.clone());
        }
        let org = if self.refused.contains(org) { org.as_str() } else { THE_REST };
        let labels = [("org", org.to_owned()), ("of", of.as_str().to_owned()), ("limit", limit.as_str().to_owned())];
        metrics::counter!("turnhouse_limit_refusals_total", &labels).increment(1);
    }
}

impl Series {
    fn add(&self, usage: &Usage) {
        let us = |ms: f64| (ms * 1_000.0) as u64;
        self.cpu_us.increment(us(usage.cpu_ms));
        self.instance_us.increment(us(usage.instance_ms));
        self.bytes_in.increment(usage.bytes_in);
        self.bytes_out.increment(usage.bytes_out);
        self.host_calls.increment(usage.host_calls);
        self.memory_peak.set(usage.memory_peak_bytes as f64);
    }

    fn of(org: &str, agent: &str) -> Series {
        let whose = [("org", org.to_owned()), ("agent", agent.to_owned())];
        Series {
            cpu_us: metrics::counter!("turnhouse_guest_cpu_microseconds_total", &whose),
            instance_us: metrics::counter!("turnhouse_guest_instance_microseconds_total", &whose),
            bytes_in: metrics::counter!("turnhouse_guest_bytes_in_total", &whose),
            bytes_out: metrics::counter!("turnhouse_guest_bytes_out_total", &whose),
            host_calls: metrics::counter!("turnhouse_host_calls_total", &whose),
            memory_peak: metrics::gauge!("turnhouse_guest_memory_peak_bytes", &whose),
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn what_guests_used_is_counted_by_org_and_agent() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let (ann, bob) = (OrgId::parse("ann").unwrap(), OrgId::parse("bob").unwrap());
        let agent = AgentId::parse("echo").unwrap();
        metrics::with_local_recorder(&recorder, || {
            let meters = Meters::default();
            let usage = Usage { cpu_ms: 1.5, bytes_out: 7, memory_peak_bytes: 65_536, ..Usage::default() };
            meters.add(&ann, &agent, &usage);
            meters.add(&ann, &agent, &usage);
            meters.add(&bob, &agent, &usage);
        });
        let text = recorder.handle().render();
        for line in [
            r#"turnhouse_guest_cpu_microseconds_total{org="ann",agent="echo"} 3000"#,
            r#"turnhouse_guest_bytes_out_total{org="bob",agent="echo"} 7"#,
            r#"turnhouse_guest_memory_peak_bytes{org="ann",agent="echo"} 65536"#,
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn o3_however_many_orgs_and_agents_there_are_the_series_are_bounded() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let org = OrgId::parse("ann").unwrap();
        metrics::with_local_recorder(&recorder, || {
            let meters = Meters::default();
            for agent in 0..TOLD_APART + 3 {
                let usage = Usage { bytes_out: 7, ..Usage::default() };
                meters.add(&org, &AgentId::parse(&format!("a-{agent}")).unwrap(), &usage);
                meters.refused(
                    &OrgId::parse(&format!("o-{agent}")).unwrap(),
                    (LimitOf::Org, LimitName::SubmitsPerSecond),
                );
            }
        });
        let text = recorder.handle().render();
        for name in ["turnhouse_guest_bytes_out_total{", "turnhouse_limit_refusals_total{"] {
            assert_eq!(text.lines().filter(|line| line.starts_with(name)).count(), TOLD_APART + 1, "{name}");
        }
        assert!(text.contains(r#"turnhouse_guest_bytes_out_total{org="_other",agent="_other"} 21"#), "{text}");
    }
}
