//! What other servers ask of this one; see [`crate::peer`].

use crate::peer::{PeerRefusal, PeerService};
use crate::wire::generated::{self as pb, peers_server::Peers};
use crate::wire::peer::{decode_peer_ask, encode_answer, encode_news, encode_standing, news_in_parts};
use fleet_cluster::model::MachineId;
use futures_util::stream::{self, BoxStream, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::debug;

/// How long it may take until a machine was asked.
const DEADLINE: Duration = Duration::from_secs(10);

/// The calls as one connection of another server has them.
pub(super) struct Service {
    pub(super) peers: Arc<dyn PeerService>,
    pub(super) asking: MachineId,
    pub(super) cancel: CancellationToken,
}

impl From<PeerRefusal> for Status {
    fn from(refusal: PeerRefusal) -> Status {
        match refusal {
            PeerRefusal::NotHere(text) => Status::not_found(text),
            PeerRefusal::NotNow(text) => Status::unavailable(text),
        }
    }
}

#[tonic::async_trait]
impl Peers for Service {
    type AskStream = BoxStream<'static, Result<pb::Answer, Status>>;
    type FollowStream = BoxStream<'static, Result<pb::News, Status>>;

    async fn ask(&self, request: Request<pb::PeerAsk>) -> Result<Response<Self::AskStream>, Status> {
        let (machine, ask) = decode_peer_ask(request.into_inner())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        debug!("server {} asks machine {machine}", self.asking);
        let answer = tokio::time::timeout(DEADLINE, self.peers.ask(machine, ask)).await;
        let answer = answer.map_err(|_| Status::unavailable("the machine does not answer"))??;
        let pieces = ReceiverStream::new(answer).map(|piece| Ok(encode_answer(piece)));
        Ok(Response::new(pieces.take_until(self.cancel.clone().cancelled_owned()).boxed()))
    }

    async fn follow(&self, _: Request<pb::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        let news = self.peers.follow()?.flat_map(|news| stream::iter(news_in_parts(news)));
        let news = news.map(|news| Ok(encode_news(news)));
        Ok(Response::new(news.take_until(self.cancel.clone().cancelled_owned()).boxed()))
    }

    async fn stand(&self, _: Request<pb::StandRequest>) -> Result<Response<pb::Standing>, Status> {
        Ok(Response::new(encode_standing(self.peers.stand())))
    }
}
