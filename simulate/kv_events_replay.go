// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/binary"
	"slices"
	"sync"

	"github.com/baton-epp/baton/simulate/zmtp"
)

// replayBuffer keeps the last messages for subscribers that missed some. Safe for concurrent use.
type replayBuffer struct {
	mu       sync.Mutex
	first    uint64 // sequence number of payloads[0]
	payloads [][]byte
}

// add keeps a payload, and at most limit of them.
func (b *replayBuffer) add(payload []byte, limit int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.payloads) == limit {
		b.payloads[0] = nil
		b.payloads = b.payloads[1:]
		b.first++
	}
	b.payloads = append(b.payloads, payload)
}

// from returns the payloads that are kept from a sequence number on, and the number of the first.
func (b *replayBuffer) from(seq uint64) (first uint64, payloads [][]byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	first = max(seq, b.first)
	skip := min(first-b.first, uint64(len(b.payloads)))
	return first, slices.Clone(b.payloads[skip:])
}

// answerReplay answers ["", first sequence number] with ["", topic, sequence number, payload] for each message that is
// kept and ["", "", -1, ""] at the end. What is no request gets no answer.
func (v *kvEvents) answerReplay(request [][]byte, reply zmtp.Reply) {
	if len(request) != 2 || len(request[0]) != 0 || len(request[1]) > 8 {
		return
	}
	start := binary.BigEndian.Uint64(append(make([]byte, 8-len(request[1])), request[1]...))
	first, payloads := v.replay.from(start)
	for i, payload := range payloads {
		if reply(nil, v.topic, binary.BigEndian.AppendUint64(nil, first+uint64(i)), payload) != nil {
			return
		}
	}
	end := binary.BigEndian.AppendUint64(nil, ^uint64(0))
	_ = reply(nil, nil, end, nil) // the next request meets the same error
}
