// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"fmt"

	"github.com/baton-epp/baton/inference"
)

// take keeps a chunk of the body, within both limits.
func (st *stream) take(chunk []byte) error {
	if int64(st.in.Body.Len+len(chunk)) > st.server.opts.MaxBodyBytes {
		return st.tooLarge()
	}
	if err := st.server.opts.Gate.Hold(len(chunk)); err != nil {
		return err
	}
	st.held += len(chunk)
	st.keep(chunk)
	return nil
}

func (st *stream) tooLarge() error {
	return fmt.Errorf("%w: limit %d bytes (limits.maxBodyBytes)", errBodyTooLarge, st.server.opts.MaxBodyBytes)
}

// smallChunk is the size in bytes below which chunks are gathered: each kept one costs a message around it, and a client
// that sends byte by byte would make the gate count a fraction of what is really held.
const smallChunk = 4 << 10

// keep adds a chunk to the body: the slice that came, or a copy of a small one behind the small ones before it.
func (st *stream) keep(chunk []byte) {
	body := &st.in.Body
	switch last := len(body.Chunks) - 1; {
	case last < 0 || len(chunk) >= smallChunk || len(chunk) == 0:
		body.Append(chunk)
		st.gathering = false
	case st.gathering && cap(body.Chunks[last])-len(body.Chunks[last]) >= len(chunk):
		body.Chunks[last] = append(body.Chunks[last], chunk...)
		body.Len += len(chunk)
	default:
		body.Append(append(make([]byte, 0, 4*smallChunk), chunk...))
		st.gathering = true
	}
}

// sendBody re-emits the body: the chunks that came, or the edited ones. Small pieces travel as one message.
func (st *stream) sendBody() error {
	chunks, size := st.in.Body.Chunks, st.in.Body.Len
	if st.answer.Body != nil {
		chunks, size = st.answer.Body.Chunks(), st.answer.Body.Len()
	}
	if len(chunks) > 1 && size <= joinBelow {
		joined := make([]byte, 0, size)
		for _, c := range chunks {
			joined = append(joined, c...)
		}
		chunks = [][]byte{joined}
	}
	for i, c := range chunks {
		if err := st.send(streamedRequestBody(c, i == len(chunks)-1 && !st.trailers)); err != nil {
			return err
		}
	}
	if len(chunks) == 0 && !st.trailers {
		return st.send(streamedRequestBody(nil, true))
	}
	return nil
}

// joinBelow is the size in bytes up to which the pieces of a spliced body are sent as one message: one message costs
// more than copying this much.
const joinBelow = 64 << 10

// release ends the hold on the body: after the request phase only ids and counters are kept.
func (st *stream) release() {
	if st.held > 0 {
		st.server.opts.Gate.Free(st.held)
		st.held = 0
	}
	st.in.Body = inference.Body{}
	if st.requestOver && st.exchange != nil {
		st.exchange.ForgetBody()
		st.answer.Body = nil
	}
}
