//! The commands' HTTP client: one request in, JSON out, and every failure as what happened and what to do.

use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::Value;
use turnhouse::ids::OrgId;

use super::output::note;
use super::{CliError, Result};

/// An answer that takes longer is none. Uploads wait for a compilation, up to `compile_timeout_ms`.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// A stream that is silent for so long is dead: hosts send a comment every 15 s.
const STREAM_TIMEOUT: Duration = Duration::from_secs(45);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which host, and as whom.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Host")]
pub struct Server {
    /// Where the host is
    #[arg(long, env = "TURNHOUSE_URL", default_value = "http://127.0.0.1:8787", value_name = "URL")]
    pub url: Url,

    /// The API key, `th_…`; better in the environment, where other users do not see it
    #[arg(long, env = "TURNHOUSE_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<Secret>,

    /// For which org: of a token that names none, whose user is a member of several
    #[arg(long, env = "TURNHOUSE_ORG", value_name = "ORG", id = "for_org")]
    pub org: Option<OrgId>,
}

/// A key on its way from the command line to a header: never printed.
#[derive(Clone)]
pub struct Secret(String);

impl From<String> for Secret {
    fn from(text: String) -> Secret {
        Secret(text)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// A host as its clients see it.
#[derive(Debug, Clone)]
pub struct Client {
    base: Url,
    /// Requests that are answered.
    requests: reqwest::Client,
    /// Streams, which may take as long as they speak.
    streams: reqwest::Client,
    warned: Arc<Once>,
}

/// Why a request has no good answer.
#[derive(Debug)]
pub enum RequestError {
    /// There was none.
    Unreachable(CliError),
    /// A problem, with its code.
    Problem {
        /// HTTP's.
        status: StatusCode,
        /// For a person.
        error: CliError,
    },
}

impl From<RequestError> for CliError {
    fn from(error: RequestError) -> CliError {
        match error {
            RequestError::Unreachable(error) | RequestError::Problem { error, .. } => error,
        }
    }
}

impl Client {
    /// A client of `server`. Nothing is sent yet.
    pub fn new(server: &Server) -> Result<Client> {
        let Some(key) = server.api_key.as_ref().map(|key| key.0.as_str()).filter(|key| !key.is_empty()) else {
            return Err(CliError::usage("an API key is needed").help(
                "pass --api-key or set TURNHOUSE_API_KEY; `turnhouse dev` prints one, `turnhouse keys create` makes one",
            ));
        };
        if !matches!(server.url.scheme(), "http" | "https") || !server.url.has_host() {
            return Err(CliError::usage(format!("{} is no address of a host", server.url))
                .help("an address looks like http://127.0.0.1:8787"));
        }
        let mut bearer = HeaderValue::from_str(&format!("Bearer {key}"))
            .map_err(|_| CliError::usage("the API key has characters that no key has"))?;
        bearer.set_sensitive(true);
        let mut headers = HeaderMap::from_iter([(AUTHORIZATION, bearer)]);
        if let Some(org) = &server.org {
            headers.insert("turnhouse-org", HeaderValue::from_str(org.as_str()).expect("ids are ASCII"));
        }
        let build = |builder: reqwest::ClientBuilder| {
            let builder = builder.default_headers(headers.clone()).connect_timeout(CONNECT_TIMEOUT);
            // A proxy for the world outside does not know this machine's own ports.
            let builder = if is_loopback(&server.url) { builder.no_proxy() } else { builder };
            let agent = concat!("turnhouse/", env!("CARGO_PKG_VERSION"));
            builder
                .user_agent(agent)
                .build()
                .map_err(|error| anyhow::anyhow!(error).context("cannot make an HTTP client"))
        };
        let mut base = server.url.clone();
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        Ok(Client {
            base,
            requests: build(reqwest::Client::builder().timeout(ANSWER_TIMEOUT))?,
            streams: build(reqwest::Client::builder().read_timeout(STREAM_TIMEOUT))?,
            warned: Arc::new(Once::new()),
        })
    }

    /// `GET path?limit=…&after=…`.
    pub async fn page(&self, path: &str, page: &PageArgs) -> Result<Value, RequestError> {
        self.page_of(path, page, &[]).await
    }

    /// The same with filters.
    pub async fn page_of(
        &self,
        path: &str,
        page: &PageArgs,
        filters: &[(&str, String)],
    ) -> Result<Value, RequestError> {
        let mut url = self.at(path);
        url.query_pairs_mut().extend_pairs(filters).append_pair("limit", &page.limit.to_string());
        if let Some(after) = &page.after {
            url.query_pairs_mut().append_pair("after", after);
        }
        self.json(self.requests.get(url)).await
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Result<Value, RequestError> {
        self.json(self.requests.get(self.at(path))).await
    }

    /// `GET path`, `None` where there is nothing.
    pub async fn find(&self, path: &str) -> Result<Option<Value>, RequestError> {
        match self.get(path).await {
            Err(RequestError::Problem { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            found => found.map(Some),
        }
    }

    /// A request with a JSON body.
    pub async fn send(&self, method: Method, path: &str, body: &Value) -> Result<Value, RequestError> {
        self.json(self.requests.request(method, self.at(path)).json(body)).await
    }

    /// A `POST` that may be sent again: the key names it, so that a lost answer is no second turn.
    pub async fn post_once(&self, path: &str, key: &str, body: &Value) -> Result<Value, RequestError> {
        let request = || self.requests.post(self.at(path)).header("idempotency-key", key).json(body);
        match self.json(request()).await {
            Err(RequestError::Unreachable(_)) => {
                tokio::time::sleep(Duration::from_millis(250)).await;
                self.json(request()).await
            }
            answered => answered,
        }
    }

    /// A request without a body.
    pub async fn call(&self, method: Method, path: &str) -> Result<Value, RequestError> {
        self.json(self.requests.request(method, self.at(path))).await
    }

    /// `POST` of a file.
    pub async fn post_bytes(&self, path: &str, media_type: &str, body: Bytes) -> Result<Value, RequestError> {
        self.json(self.requests.post(self.at(path)).header("content-type", media_type).body(body)).await
    }

    /// `PUT` of a body that is sent in pieces, each told to `sent`.
    pub async fn upload(
        &self,
        path: &str,
        body: Bytes,
        sent: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Value, RequestError> {
        const PIECE_BYTES: usize = 64 * 1024;
        let total = body.len();
        let pieces = (0..total).step_by(PIECE_BYTES).map(move |from| {
            let to = total.min(from + PIECE_BYTES);
            sent(to as u64);
            Ok::<_, std::io::Error>(body.slice(from..to))
        });
        let request = self
            .requests
            .put(self.at(path))
            .header("content-type", "application/wasm")
            .header("content-length", total)
            .body(reqwest::Body::wrap_stream(futures_util::stream::iter(pieces)));
        self.json(request).await
    }

    /// A stream of events from after `last_event_id`; `None` when there are no more.
    pub async fn events(&self, path: &str, last_event_id: Option<&str>) -> Result<Option<Response>, RequestError> {
        let mut request = self.streams.get(self.at(path)).header("accept", "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = self.answer(request).await?;
        Ok((response.status() != StatusCode::NO_CONTENT).then_some(response))
    }

    /// An answer that is read as it comes.
    pub async fn download(&self, path: &str) -> Result<Response, RequestError> {
        self.answer(self.streams.get(self.at(path))).await
    }

    fn at(&self, path: &str) -> Url {
        self.base.join(path.trim_start_matches('/')).expect("paths are made of valid ids")
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, RequestError> {
        let body = self.answer(request).await?.bytes().await.map_err(|error| self.unreachable(&error))?;
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|_| {
            let error = CliError::failed(format!("{} did not answer with JSON", self.base));
            RequestError::Unreachable(error.help("is this address a Turnhouse host? see --url"))
        })
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Response, RequestError> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        if let Some(at) = response.headers().get("turnhouse-key-expires-at").and_then(|at| at.to_str().ok()) {
            // Once is enough, however much a command asks.
            self.warned.call_once(|| {
                note(&format!("this API key ends at {at}; ask for its successor (`turnhouse keys rotate`)"))
            });
        }
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let body = response.bytes().await.unwrap_or_default();
        Err(RequestError::Problem { status, error: problem(status, &body, retry_after.as_deref()) })
    }

    fn unreachable(&self, error: &reqwest::Error) -> RequestError {
        let url = self.base.as_str().trim_end_matches('/');
        RequestError::Unreachable(if error.is_connect() {
            CliError::failed(format!("no connection to {url}"))
                .help(format!("is a host running at {url}? start one with `turnhouse dev`, or see --url"))
        } else if error.is_timeout() {
            CliError::failed(format!("{url} did not answer in time"))
                .help("try again; the host's log says what it does")
        } else {
            CliError::failed(format!("the connection to {url} broke")).help("try again; the host's log may say why")
        })
    }
}

/// Which stretch of a list.
#[derive(Debug, Clone, clap::Args)]
pub struct PageArgs {
    /// How many at most
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100), value_name = "N")]
    pub limit: u32,

    /// Go on after this cursor, the `next` of the list before
    #[arg(long, value_name = "CURSOR")]
    pub after: Option<String>,
}

/// A problem body (RFC 9457) as an error.
fn problem(status: StatusCode, body: &[u8], retry_after: Option<&str>) -> CliError {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let Some(code) = body["code"].as_str() else {
        return CliError::failed(format!("the host answered {status}"))
            .help("is this address a Turnhouse host? see --url");
    };
    let title = body["title"].as_str().unwrap_or("the request was refused");
    let mut help = body["detail"].as_str().unwrap_or_default().to_owned();
    if let Some(seconds) = retry_after {
        help = format!("{help} (try again in {seconds} s)").trim_start().to_owned();
    }
    if help.is_empty() && status == StatusCode::UNAUTHORIZED {
        help = "see --api-key; `turnhouse keys create` makes one".to_owned();
    }
    CliError::failed(format!("{title} ({code})")).help(help)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::super::output::Style;
    use super::*;

    fn server(url: &str, key: Option<&str>) -> Server {
        Server { url: url.parse().unwrap(), api_key: key.map(|key| Secret(key.to_owned())), org: None }
    }

    #[test]
    fn a_problem_becomes_what_happened_and_what_to_do() {
        let body = br#"{"title":"conversation busy","status":409,"code":"conversation_busy","detail":"wait for it"}"#;
        let error = problem(StatusCode::CONFLICT, body, None).render(Style::plain());
        assert_eq!(error, "error: conversation busy (conversation_busy)\n  help: wait for it");
        let body = br#"{"title":"rate limited","code":"rate_limited","detail":"slower"}"#;
        let error = problem(StatusCode::TOO_MANY_REQUESTS, body, Some("3")).render(Style::plain());
        assert_eq!(error, "error: rate limited (rate_limited)\n  help: slower (try again in 3 s)");
        let error = problem(StatusCode::BAD_GATEWAY, b"<html>", None).render(Style::plain());
        assert!(error.contains("502") && error.contains("--url"), "{error}");
    }

    #[test]
    fn without_a_key_nothing_is_sent_and_the_key_is_never_shown() {
        let error = Client::new(&server("http://127.0.0.1:1", None)).unwrap_err();
        assert!(error.render(Style::plain()).contains("TURNHOUSE_API_KEY"));
        let client = Client::new(&server("http://127.0.0.1:1", Some("th_secret"))).unwrap();
        assert!(!format!("{client:?}").contains("th_secret"));
        assert!(!format!("{:?}", server("http://127.0.0.1:1", Some("th_secret"))).contains("th_secret"));
        let error = Client::new(&server("http://127.0.0.1:1", Some("th_sec\nret"))).unwrap_err();
        assert!(!error.render(Style::plain()).contains("sec"));
    }

    #[tokio::test]
    async fn a_refused_connection_asks_whether_a_host_runs() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let client = Client::new(&server(&format!("http://{free}"), Some("th_x"))).unwrap();
        let error = CliError::from(client.get("v1/agents").await.unwrap_err()).render(Style::plain());
        assert!(error.contains("is a host running at http://127.0.0.1:") && error.contains("turnhouse dev"), "{error}");
    }

    #[test]
    fn a_path_of_the_address_is_kept() {
        let client = Client::new(&server("https://example.org/agents", Some("th_x"))).unwrap();
        assert_eq!(client.at("v1/turns").as_str(), "https://example.org/agents/v1/turns");
        assert!(is_loopback(&"http://[::1]:80".parse().unwrap()) && !is_loopback(&"http://10.0.0.1".parse().unwrap()));
    }
}
