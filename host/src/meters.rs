//! What guests used, as metrics by org and agent. A series' handles are looked up once: every turn that ends comes through here, on the journal's thread.

use dashmap::DashMap;
use metrics::{Counter, Gauge};

use crate::ids::{AgentId, OrgId};
use crate::turn::Usage;

/// The series of every org and agent that has had a turn since the start.
#[derive(Default)]
pub struct Meters(DashMap<(OrgId, AgentId), Series>);

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
        let series = self.0.entry(key).or_insert_with(|| Series::of(org, agent));
        let us = |ms: f64| (ms * 1_000.0) as u64;
        series.cpu_us.increment(us(usage.cpu_ms));
        series.instance_us.increment(us(usage.instance_ms));
        series.bytes_in.increment(usage.bytes_in);
        series.bytes_out.increment(usage.bytes_out);
        series.host_calls.increment(usage.host_calls);
        series.memory_peak.set(usage.memory_peak_bytes as f64);
    }
}

impl Series {
    fn of(org: &OrgId, agent: &AgentId) -> Series {
        let whose = [("org", org.to_string()), ("agent", agent.to_string())];
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
}
