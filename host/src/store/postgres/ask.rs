//! How one statement is run: over a connection of the pool, in a transaction where it needs one, and not for ever.

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgRow;
use sqlx::{Connection as _, PgConnection, Postgres, SqlSafeStr as _, SqlStr, Transaction};
use tokio::time::error::Elapsed;

use super::{ANSWER_TIMEOUT, Asked, BEGIN, PostgresStore, Route, silent};

impl PostgresStore {
    /// The rows of one statement that is no org's alone, which commits by itself.
    pub(super) async fn rows_hostwide(&self, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
        self.rows_in(Frame::bare(self.route), asked).await
    }

    /// The first row of such a statement, if there is one.
    pub(super) async fn row_hostwide(&self, asked: Asked<'_>) -> Result<Option<PgRow>, sqlx::Error> {
        Ok(self.rows_hostwide(asked).await?.into_iter().next())
    }

    /// The one row of such a statement that always has one.
    pub(super) async fn one_hostwide(&self, asked: Asked<'_>) -> Result<PgRow, sqlx::Error> {
        self.row_hostwide(asked).await?.ok_or(sqlx::Error::RowNotFound)
    }

    /// How many rows such a statement changed, which commits by itself.
    pub(super) async fn change_hostwide(&self, asked: Asked<'_>) -> Result<u64, sqlx::Error> {
        self.change_in(Frame::bare(self.route), asked).await
    }

    /// A transaction that is no org's alone, for administration.
    pub(super) async fn begin_hostwide(
        &self,
        begin: &'static str,
    ) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        self.begin(begin.into_sql_str()).await
    }

    /// In a task, so that it is seen through when whoever asks goes away: sqlx rolls no transaction back whose beginning it has not seen, and the next user
    /// of the connection would be in it.
    pub(super) async fn begin(&self, begin: SqlStr) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        let pool = self.pool.clone();
        let begun = tokio::spawn(async move { pool.begin_with(begin).await });
        begun.await.unwrap_or_else(|_| Err(sqlx::Error::WorkerCrashed))
    }

    pub(super) async fn rows_in(&self, frame: Frame, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
        let mut taken = Taken::new(self.pool.acquire().await?);
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, rows(frame, taken.connection(), asked)).await;
        self.settled(taken, answered)
    }

    pub(super) async fn change_in(&self, frame: Frame, asked: Asked<'_>) -> Result<u64, sqlx::Error> {
        let mut taken = Taken::new(self.pool.acquire().await?);
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, change(frame, taken.connection(), asked)).await;
        self.settled(taken, answered)
    }

    /// Gives the connection back to the pool, unless nobody knows what will still come over it.
    fn settled<T>(&self, taken: Taken, answered: Result<Result<T, sqlx::Error>, Elapsed>) -> Result<T, sqlx::Error> {
        let connection = taken.whole();
        answered.map_or_else(
            |_| {
                drop(connection.detach());
                Err(silent())
            },
            |done| done.inspect_err(|error| self.broke.note(error)),
        )
    }
}

/// A connection of the pool while something is under way on it. Whoever asked may go away at any moment (a client that hangs up), also while a transaction
/// begins; that is rolled back before anybody else gets the connection. See [`PostgresStore::begin`].
struct Taken(Option<PoolConnection<Postgres>>);

impl Taken {
    fn new(connection: PoolConnection<Postgres>) -> Taken {
        Taken(Some(connection))
    }

    fn connection(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect("only `whole` takes it")
    }

    /// Nothing is under way any more.
    fn whole(mut self) -> PoolConnection<Postgres> {
        self.0.take().expect("only this takes it")
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(mut connection) = self.0.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            drop(connection.detach());
            return;
        };
        runtime.spawn(async move {
            let ended = tokio::time::timeout(ANSWER_TIMEOUT, sqlx::raw_sql("ROLLBACK").execute(&mut *connection)).await;
            if !matches!(ended, Ok(Ok(_))) {
                drop(connection.detach());
            }
        });
    }
}

/// The transaction that one statement gets for itself.
pub(super) enum Frame {
    /// The server's own: it commits by itself, and what it runs under is the session's.
    Bare,
    /// One that says what it runs under in the message that begins it.
    Begun { begin: SqlStr, commits: bool },
}

impl Frame {
    /// For a statement of the login role.
    pub(super) fn bare(route: Route) -> Frame {
        match route {
            Route::Direct => Frame::Bare,
            Route::Pooled => Frame::Begun { begin: BEGIN.into_sql_str(), commits: true },
        }
    }
}

pub(super) async fn rows(
    frame: Frame,
    connection: &mut PgConnection,
    asked: Asked<'_>,
) -> Result<Vec<PgRow>, sqlx::Error> {
    let Frame::Begun { begin, commits } = frame else { return asked.fetch_all(connection).await };
    let mut tx = connection.begin_with(begin).await?;
    let rows = asked.fetch_all(&mut *tx).await?;
    if commits {
        tx.commit().await?;
    }
    // Or else it ends as the connection goes back to the pool, and nobody waits for that.
    Ok(rows)
}

/// A transaction through a pooler for what takes locks that other hosts wait for: `lays_down` only keeps its values in the transaction (`set_config`), and
/// `then` works with them and commits, in one message. No lock is held while the network is waited for, however slow or silent it is.
pub(super) async fn staged(
    connection: &mut PgConnection,
    lays_down: Asked<'_>,
    then: &'static str,
) -> Result<Vec<PgRow>, sqlx::Error> {
    let done = async {
        sqlx::raw_sql(BEGIN).execute(&mut *connection).await?;
        lays_down.execute(&mut *connection).await?;
        sqlx::raw_sql(then).fetch_all(&mut *connection).await
    };
    let done = done.await;
    if done.is_err() {
        // Not sqlx's transaction, which would end it by itself. Where the session is over, so is this.
        let _ = sqlx::raw_sql("ROLLBACK").execute(connection).await;
    }
    done
}

async fn change(frame: Frame, connection: &mut PgConnection, asked: Asked<'_>) -> Result<u64, sqlx::Error> {
    let Frame::Begun { begin, .. } = frame else { return Ok(asked.execute(connection).await?.rows_affected()) };
    let mut tx = connection.begin_with(begin).await?;
    let done = asked.execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(done.rows_affected())
}
