//! Protobuf for gRPC with small buffers: tonic's own of 8 KiB for each direction would be a quarter of what an idle
//! session takes, and a server has thousands of them. They grow with what they hold.

use prost::Message;
use std::marker::PhantomData;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Sizes of a fresh buffer, and of what is encoded before it is sent, bytes.
fn buffers() -> BufferSettings {
    BufferSettings::new(512, 32 << 10)
}

#[derive(Debug, Clone)]
pub(crate) struct LeanCodec<T, U> {
    kind: PhantomData<(T, U)>,
}

impl<T, U> Default for LeanCodec<T, U> {
    fn default() -> Self {
        LeanCodec { kind: PhantomData }
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> Codec for LeanCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(buffers())
    }
}
