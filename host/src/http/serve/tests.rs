//! The door itself, over real connections: what it lets in, for how long, and how it speaks.

use axum::body::Body;
use axum::routing::get;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

use super::*;

const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(30);

fn door(router: Router) -> Door {
    Door {
        router,
        connections_max: 10,
        addresses: Addresses::new(0, false),
        tls: None,
        patience: PATIENCE,
        drain_timeout: Duration::from_secs(10),
    }
}

fn hello() -> Router {
    Router::new().route("/", get(async || "hello"))
}

/// A door that is open until the token is cancelled.
async fn open(door: Door) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    let stopped = stop.clone();
    let server = tokio::spawn(async move { door.accept(listener, stopped.cancelled_owned()).await });
    (address, stop, server)
}

/// Everything to the connection's end, however it comes.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("it is let go");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn who_says_nothing_is_let_go_and_who_speaks_is_answered() {
    let patience = Patience { opening: SOON, unread: LONG, idle: LONG };
    let (address, stop, server) = open(Door { patience, ..door(hello()) }).await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(rest(&mut silent).await, "");
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(rest(&mut client).await.ends_with("hello"));
    stop.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn an_address_with_too_many_connections_gets_no_further_one() {
    let (address, stop, server) = open(Door { addresses: Addresses::new(2, true), ..door(hello()) }).await;
    let ask = async |client: &mut TcpStream| {
        let _ = client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let mut head = [0; 15];
        client.read_exact(&mut head).await.map(|_| head)
    };
    let mut first = TcpStream::connect(address).await.unwrap();
    let mut second = TcpStream::connect(address).await.unwrap();
    assert_eq!(&ask(&mut first).await.unwrap(), b"HTTP/1.1 200 OK");
    assert_eq!(&ask(&mut second).await.unwrap(), b"HTTP/1.1 200 OK");
    let mut third = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut third).await.is_err(), "it is closed");
    drop(first);
    tokio::time::timeout(LONG, async {
        loop {
            let mut again = TcpStream::connect(address).await.unwrap();
            if ask(&mut again).await.is_ok() {
                break;
            }
        }
    })
    .await
    .expect("there is room again");
    stop.cancel();
    server.await.unwrap();
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// HTTP/2 has no clock of its own for whoever acknowledges pings and asks nothing.
#[tokio::test]
async fn an_idle_connection_is_let_go_and_one_with_a_stream_is_not() {
    let idle = Duration::from_millis(200);
    let (ended, end) = oneshot::channel::<()>();
    let end = Arc::new(parking_lot::Mutex::new(Some(end)));
    let stream = get(async move || {
        let end = end.lock().take().expect("asked once");
        Body::from_stream(futures_util::stream::once(async move {
            let _ = end.await;
            Ok::<_, std::io::Error>("over")
        }))
    });
    let router = hello().route("/stream", stream);
    let (address, stop, server) = open(Door { patience: Patience { idle, ..PATIENCE }, ..door(router) }).await;
    let mut quiet = TcpStream::connect(address).await.unwrap();
    quiet.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    quiet.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    rest(&mut quiet).await;
    let mut reader = TcpStream::connect(address).await.unwrap();
    reader.write_all(b"GET /stream HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    tokio::time::sleep(idle * 4).await;
    ended.send(()).unwrap();
    assert!(rest(&mut reader).await.contains("over"), "a stream is not idle, however quiet it is");
    stop.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn requests_that_are_taken_back_as_fast_as_they_are_made_end_their_connection() {
    let (address, stop, server) = open(door(hello())).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    client.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    // :method GET, :scheme http, :path /, :authority a; then CANCEL.
    let head = [0x82, 0x86, 0x84, 0x41, 1, b'a'];
    let mut flood = Vec::new();
    for stream in (1..20_000).step_by(2) {
        flood.extend(frame(1, 0b101, stream, &head));
        flood.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    let (mut reading, mut writing) = client.into_split();
    let written = tokio::spawn(async move { writing.write_all(&flood).await });
    let mut told = Vec::new();
    let _ = tokio::time::timeout(LONG, reading.read_to_end(&mut told)).await.expect("it is let go");
    // GOAWAY with ENHANCE_YOUR_CALM.
    assert!(told.windows(4).any(|word| word == 11_u32.to_be_bytes()), "{told:?}");
    let _ = written.await.unwrap();
    let mut other = TcpStream::connect(address).await.unwrap();
    other.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(rest(&mut other).await.ends_with("hello"), "others are served");
    stop.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn both_protocols_are_spoken_over_tls_and_nothing_is_without() {
    let dir = tempfile::tempdir().unwrap();
    let (files, certificate) = tls::tests::files(dir.path());
    let (address, stop, server) = open(Door { tls: Some(Tls::load(&files).unwrap()), ..door(hello()) }).await;
    let url = format!("https://localhost:{}/", address.port());
    let trusted = || {
        let root = reqwest::Certificate::from_pem(certificate.as_bytes()).unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([root]).resolve("localhost", address)
    };
    for (client, version) in [
        (trusted().http1_only().build().unwrap(), reqwest::Version::HTTP_11),
        (trusted().build().unwrap(), reqwest::Version::HTTP_2),
    ] {
        let answer = client.get(&url).send().await.unwrap();
        assert_eq!((answer.version(), answer.status().as_u16()), (version, 200));
        assert_eq!(answer.headers()["strict-transport-security"], "max-age=31536000");
        assert_eq!(answer.text().await.unwrap(), "hello");
    }
    let stranger = reqwest::Client::builder().no_proxy().resolve("localhost", address).build().unwrap();
    assert!(stranger.get(&url).send().await.is_err(), "nobody else vouches for it");
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert!(!rest(&mut plain).await.contains("hello"));
    stop.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn shutdown_lets_an_open_stream_end_and_accepts_nothing_more() {
    let (release, released) = oneshot::channel::<()>();
    let released = Arc::new(parking_lot::Mutex::new(Some(released)));
    let stream = async move || {
        let released = released.lock().take();
        Body::from_stream(futures_util::stream::unfold(released, async |released| {
            released?.await.ok();
            Some((Ok::<_, std::io::Error>("the end"), None))
        }))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let server = tokio::spawn(async move {
        let router = Router::new().route("/", get(stream));
        door(router).accept(listener, stopped.cancelled()).await;
    });
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut head = [0; 15];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK");
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(5), async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it accepts nothing more");
    assert!(!server.is_finished(), "the stream is open");
    release.send(()).unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains("the end"), "{rest}");
    server.await.unwrap();
}
