//! What a host tells its operator: logs on stderr, metrics for Prometheus.
//!
//! No message's text and no secret is in either: logs carry ids, codes and figures, labels only what has few values (a state, a code, a route).
//! The program installs both once; a library user may install their own recorder and subscriber instead.

use std::io::IsTerminal as _;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// What is logged when nobody says otherwise. The sandbox's libraries would open a span for every call of a guest.
const DEFAULT_DIRECTIVES: &str = "info,wasmtime=warn,wasmtime_wasi=warn,wiggle=warn";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line, for machines.
    Json,
    /// For people.
    Text,
}

/// The variable that filters logs: `info`, `turnhouse=debug,sqlx=warn`.
pub const LOG_VARIABLE: &str = "TURNHOUSE_LOG";

/// Sends logs to stderr, from `info` up unless `TURNHOUSE_LOG` says otherwise. Does nothing when a subscriber is installed already.
pub fn install_logs(format: LogFormat) -> Result<(), ParseError> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(directives) if !directives.trim().is_empty() => EnvFilter::builder().parse(directives)?,
        _ => EnvFilter::new(DEFAULT_DIRECTIVES),
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // The second installation of a process (a test's) keeps the first: that is the wanted outcome, not an error.
    let _ = match format {
        LogFormat::Json => logs.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| {
        // Of the payload only what was written in the source: a formatted one may carry somebody's text.
        let what = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("see the line");
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, what, "a task panicked; this is a bug of the host");
    }));
    Ok(())
}

/// Upper bounds of the buckets of times, seconds: from a turn of an echo to the longest that an agent may set.
const SECONDS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0, 900.0,
];

/// Upper bounds of the buckets of counts.
const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Installs the process's recorder and describes every metric. The handle renders them; its `run_upkeep` must be called every few seconds.
pub fn install_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = builder()?.install_recorder()?;
    describe();
    Ok(handle)
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_batch_writes".to_owned()), COUNTS)
}

macro_rules! metrics {
    ($($name:literal, $describe:ident, $unit:ident, $about:literal;)*) => {
        /// The metrics of a host: name and meaning. Whoever adds one to the code adds it here.
        pub const METRICS: &[(&str, &str)] = &[$(($name, $about),)*];

        fn describe() {
            $($describe!($name, Unit::$unit, $about);)*
        }
    };
}

metrics! {
    "turnhouse_turns_total", describe_counter, Count, "Turns that ended, by `state` and, when failed, `code`.";
    "turnhouse_turn_duration_seconds", describe_histogram, Seconds, "From a turn's acceptance to its end.";
    "turnhouse_guest_cpu_microseconds_total", describe_counter, Microseconds, "CPU time of guests, by `org` and `agent`.";
    "turnhouse_guest_instance_microseconds_total", describe_counter, Microseconds, "How long guests' instances existed, by `org` and `agent`.";
    "turnhouse_guest_memory_peak_bytes", describe_gauge, Bytes, "The largest memory of the guest that ended last, by `org` and `agent`.";
    "turnhouse_guest_bytes_in_total", describe_counter, Bytes, "What guests read, by `org` and `agent`.";
    "turnhouse_guest_bytes_out_total", describe_counter, Bytes, "What guests wrote, by `org` and `agent`.";
    "turnhouse_host_calls_total", describe_counter, Count, "Calls that guests made of the host's functions, by `org` and `agent`.";
    "turnhouse_live_turns", describe_gauge, Count, "Turns that owe an answer, by `state`: waiting, ready, running.";
    "turnhouse_guests_waiting", describe_gauge, Count, "Guests that could run and wait for a thread: more than a few for long, and the processors are too few.";
    "turnhouse_slots_in_use", describe_gauge, Count, "Places for guests that are taken, of limits.host_running_max.";
    "turnhouse_gate_refusals_total", describe_counter, Count, "Envelopes that the gate refused, by `reason`.";
    "turnhouse_private_dir_refusals_total", describe_counter, Count, "File operations of workers that were over their quota, by `limit`: bytes, files.";
    "turnhouse_journal_batch_writes", describe_histogram, Count, "Writes that one transaction of the journal took.";
    "turnhouse_limit_refusals_total", describe_counter, Count, "Messages and new conversations that were over a limit of their org, by org and limit.";
    "turnhouse_accept_held_seconds", describe_histogram, Seconds, "How long messages of an org waited for others of the same org, where they did: several orgs send, and this one more than its share.";
    "turnhouse_store_lock_wait_seconds", describe_histogram, Seconds, "How long batches waited for other hosts' batches, where they did (PostgreSQL).";
    "turnhouse_vacuums_total", describe_counter, Count, "How often this host vacuumed the table of live turns (PostgreSQL).";
    "turnhouse_retained_rows_total", describe_counter, Count, "Ended turns, logs and entries of the audit that were deleted because they were old.";
    "turnhouse_attachment_uploads_total", describe_counter, Count, "Attachments that were uploaded.";
    "turnhouse_attachment_upload_bytes_total", describe_counter, Bytes, "Their bytes.";
    "turnhouse_exports_total", describe_counter, Count, "Exports that were begun, by `of`: org, conversation.";
    "turnhouse_audit_entries_total", describe_counter, Count, "What this process wrote down in the audit, by `verb`.";
    "turnhouse_store_errors_total", describe_counter, Count, "Transactions of the journal that failed as a whole.";
    "turnhouse_http_requests_total", describe_counter, Count, "Requests, by `method`, `route` and `status`.";
    "turnhouse_http_request_duration_seconds", describe_histogram, Seconds, "From a request's head to its response's, by `method` and `route`.";
    "turnhouse_connections_refused_total", describe_counter, Count, "Connections that were not let in, by `reason`: address (it has limits.connections_per_address_max), tls (its handshake failed).";
    "turnhouse_auth_refusals_total", describe_counter, Count, "Requests that were nobody's, by `reason`.";
    "turnhouse_oidc_fetches_total", describe_counter, Count, "Fetches of an issuer's keys, by `issuer` and `result`: fetched, failed.";
    "turnhouse_streams_open", describe_gauge, Count, "Event streams that are open.";
    "turnhouse_compiles_total", describe_counter, Count, "Compilations of modules, by `result`: compiled, or the refusal's code.";
    "turnhouse_compile_duration_seconds", describe_histogram, Seconds, "From a module's inspection to its native code or its refusal.";
    "turnhouse_module_cache_total", describe_counter, Count, "Look-ups of compiled modules on disk, by `result`: hit, miss, rejected.";
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn metrics_are_rendered_with_their_buckets_and_described() {
        let recorder = builder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            describe();
            metrics::counter!("turnhouse_turns_total", "state" => "completed").increment(2);
            metrics::histogram!("turnhouse_turn_duration_seconds").record(0.002);
        });
        let text = handle.render();
        assert!(text.contains("# HELP turnhouse_turns_total Turns that ended"), "{text}");
        assert!(text.contains("turnhouse_turns_total{state=\"completed\"} 2"), "{text}");
        assert!(text.contains("turnhouse_turn_duration_seconds_bucket{le=\"0.0025\"} 1"), "{text}");
    }

    /// The names in the sources' `counter!`, `gauge!` and `histogram!`.
    fn emitted(directory: &Path, names: &mut std::collections::BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                emitted(&path, names);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                for macro_name in ["counter!(", "gauge!(", "histogram!("] {
                    let after = text.split(macro_name).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
                    let found = after.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()));
                    // This test's own text has the macros' names, too.
                    names.extend(found.filter(|name| name.starts_with("turnhouse_")));
                }
            }
        }
    }

    #[test]
    fn every_metric_that_the_code_emits_is_described_and_none_else() {
        let mut names = std::collections::BTreeSet::new();
        emitted(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
        let described = METRICS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names, described);
    }
}
