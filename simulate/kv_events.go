// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tinylib/msgp/msgp"

	"github.com/baton-epp/baton/simulate/zmtp"
)

// KVEvents are what an engine tells about its prefix cache over ZeroMQ (--kv-events-config of vLLM). The zero value
// publishes nothing. Block hashes are those of --prefix-caching-hash-algo sha256_cbor.
//
// One thing is unlike vLLM: the simulated cache keeps one block of a hash where vLLM keeps several, so that no hash is told
// as stored twice without a removal in between.
type KVEvents struct {
	Endpoint     string // where to publish (endpoint): "tcp://*:5557", each data-parallel rank one port on; * is the engine's address, port 0 a free one; "" is off
	Replay       string // where to answer replay requests, likewise (replay_endpoint); "" is nowhere
	Topic        string // of every message (topic); {addr} and {model} stand for the engine's
	Encoding     string // "" is events as maps, as in vLLM 0.32; "array" as before PR #42892
	HashBytes    bool   // hashes as 32 bytes (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0), not as the low 64 bits
	BufferSteps  int    // messages kept for replays (buffer_steps); default 10000
	HWM          int    // messages that wait for one slow subscriber, more are lost to it (hwm); default 100000
	StepTokens   int    // tokens that one scheduler step prefills (--max-num-batched-tokens), a message each; default 2048
	ClearOnStart bool   // the first message after a restart begins with AllBlocksCleared; with vLLM 0.32 the sequence alone tells of one
}

const encodingArray = "array"

// maxKVQueue bounds HWM, BufferSteps and StepTokens.
const maxKVQueue = 1 << 24

func (o *KVEvents) setDefaults() {
	orDefault(&o.BufferSteps, 10_000)
	orDefault(&o.HWM, 100_000)
	orDefault(&o.StepTokens, 2048)
}

// check names the flag of baton simulate where there is one. ranks is how many ports each endpoint needs.
func (o *KVEvents) check(engine string, ranks int) error {
	var errs []error
	for _, at := range []struct{ flag, endpoint string }{{"--kv-events-endpoint", o.Endpoint}, {"--kv-events-replay-endpoint", o.Replay}} {
		if at.endpoint == "" {
			continue
		}
		if _, err := endpointPort(at.endpoint); err != nil {
			errs = append(errs, fmt.Errorf("%s: %q, must be tcp://*:PORT: to an address of its own a server connects, and the simulated one only listens", at.flag, at.endpoint))
		} else if _, err := endpointPort(shifted(at.endpoint, max(ranks, 1)-1)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %q, must leave %d ports up to %d, one for each rank", at.flag, at.endpoint, ranks, math.MaxUint16))
		}
	}
	if o.Endpoint != "" && engine != "" && engine != engineVLLM {
		errs = append(errs, fmt.Errorf("--kv-events-endpoint: only vLLM's KV events are simulated, not those of %s", engine))
	}
	if o.Replay != "" && o.Endpoint == "" {
		errs = append(errs, errors.New("--kv-events-replay-endpoint: only with --kv-events-endpoint"))
	}
	if o.Encoding != "" && o.Encoding != encodingArray {
		errs = append(errs, fmt.Errorf("--kv-events-encoding: %q, must be empty or %s", o.Encoding, encodingArray))
	}
	for _, n := range []struct {
		name  string
		value int
	}{{"BufferSteps", o.BufferSteps}, {"HWM", o.HWM}, {"StepTokens", o.StepTokens}} {
		if n.value < 1 || n.value > maxKVQueue {
			errs = append(errs, fmt.Errorf("KVEvents.%s: %d, must be from 1 to %d", n.name, n.value, maxKVQueue))
		}
	}
	return errors.Join(errs...)
}

func endpointPort(endpoint string) (int, error) {
	text, ok := strings.CutPrefix(endpoint, "tcp://*:")
	port, err := strconv.ParseUint(text, 10, 16)
	if !ok {
		err = errors.New("not tcp://*:PORT")
	}
	return int(port), err
}

// shifted is endpoint some ports on; those of port 0 or "" stay.
func shifted(endpoint string, by int) string {
	port, err := endpointPort(endpoint)
	if err != nil || port == 0 {
		return endpoint
	}
	return "tcp://*:" + strconv.Itoa(port+by)
}

// checkApart refuses ports of which a pool that needs n for each of the two would give one out twice.
func (o *KVEvents) checkApart(n int) error {
	events, _ := endpointPort(o.Endpoint) // check says what is wrong with one alone
	replay, _ := endpointPort(o.Replay)
	if events == 0 || replay == 0 || max(events, replay)-min(events, replay) >= n {
		return nil
	}
	return fmt.Errorf("--kv-events-endpoint, --kv-events-replay-endpoint: ports %d and %d, must be %d apart: one for each rank of each engine", events, replay, n)
}

// kvEvents publishes what the prefix cache of one rank holds. Like the scheduler that it belongs to, it needs process.mu;
// nothing in it waits for anybody.
type kvEvents struct {
	// Immutable after openEvents.
	opts   KVEvents
	size   int // tokens per block
	rank   int
	root   blockHash
	topic  []byte
	faults *faultState
	pub    *zmtp.Pub
	router *zmtp.Router // nil without a replay endpoint
	replay replayBuffer // has its own lock

	held    map[int32]blockHash // by block id: what was told as stored and has not left since
	evicted map[int32]blockHash // by block id: what has left and was not told yet
	leaving map[blockHash]int32 // evicted, by hash
	parked  map[blockHash]int   // leases on blocks in CPU memory
	gone    eventList           // of the next message
	come    eventList           // of the next message, after gone
	next    uint64              // sequence number
	late    [][]byte            // a message that a fault sends after the one that follows it
}

// eventList is some encoded events.
type eventList struct {
	encoded []byte
	count   uint32
}

// announce adds the blocks of q from the one at first on that are new in the prefix cache to the next message: an event for
// each run of neighbours. step is how many tokens a scheduler step computed: each step is a message; 0 is all in one.
func (s *scheduler) announce(q *sequence, first, step int) {
	v := s.events
	if v == nil {
		return
	}
	begin, run, end, chunk := first, first, min(len(q.chain), len(q.blocks)), 0
	for at := first; at < end; at++ {
		if step > 0 {
			if c := max((at+1)*v.size-q.cached-1, 0) / step; c != chunk {
				v.stored(q, run, at)
				v.removed(q.blocks[begin:at])
				v.publish()
				begin, run, chunk = at, at, c
			}
		}
		id := q.blocks[at]
		if _, known := v.held[id]; known || s.cache.blocks[id].key != q.key(q.chain[at]) { // or another block is cached for it
			v.stored(q, run, at)
			run = at + 1
			continue
		}
		h := q.hash(v, at)
		if old, ok := v.leaving[h]; ok { // it was cached in a block that another request took, and told nobody yet
			v.removed([]int32{old})
		}
		v.held[id] = h
	}
	v.stored(q, run, end)
	v.removed(q.blocks[begin:])
}

// flush publishes what is pending as one message: vLLM does so at the end of a scheduler step.
func (s *scheduler) flush() {
	if v := s.events; v != nil {
		v.removed(slices.Sorted(maps.Keys(v.evicted)))
		v.publish()
	}
}

// resetCache empties the prefix cache. A real engine tells of it with its next step, and so with the next request.
func (s *scheduler) resetCache() {
	if s.events != nil && s.cache.used() == 0 {
		s.events.cleared()
	}
	s.cache.evict()
}

// evict is told of each block that leaves the prefix cache.
func (v *kvEvents) evict(id int32) {
	if h, ok := v.held[id]; ok {
		delete(v.held, id)
		v.evicted[id], v.leaving[h] = h, id
	}
}

// removed tells what the blocks ids held before they were taken for something else: an event for each.
func (v *kvEvents) removed(ids []int32) {
	for _, id := range ids {
		if h, ok := v.evicted[id]; ok {
			delete(v.evicted, id)
			delete(v.leaving, h)
			v.add(&v.gone, eventRemoved, v.removedFields(mediumGPU, h))
		}
	}
}

func (v *kvEvents) stored(q *sequence, from, to int) {
	if from < to {
		v.add(&v.come, eventStored, v.storedFields(q, from, to))
	}
}

func (v *kvEvents) cleared() {
	clear(v.held)
	clear(v.evicted)
	clear(v.leaving)
	v.add(&v.gone, eventCleared, nil)
}

// park tells that the full blocks of q's prompt are in CPU memory now, those that were not there yet.
func (v *kvEvents) park(q *sequence) (parked []blockHash) {
	var added []blockHash
	for at := range q.prompt / v.size {
		h := q.hash(v, at)
		parked = append(parked, h)
		if v.parked[h]++; v.parked[h] == 1 {
			added = append(added, h)
		}
	}
	if len(added) > 0 {
		v.add(&v.come, eventStored, v.parkedFields(added))
		v.publish()
	}
	return parked
}

// unpark tells, with the next step, what no lease keeps in CPU memory any more.
func (v *kvEvents) unpark(parked []blockHash) {
	var freed []blockHash
	for _, h := range parked {
		if v.parked[h]--; v.parked[h] <= 0 {
			delete(v.parked, h)
			freed = append(freed, h)
		}
	}
	if len(freed) > 0 {
		v.add(&v.gone, eventRemoved, v.removedFields(mediumCPU, freed...))
	}
}

// publish sends the pending events, if there are any: first what went, then what came.
func (v *kvEvents) publish() {
	if v.gone.count+v.come.count == 0 {
		return
	}
	payload := msgp.AppendArrayHeader(make([]byte, 0, len(v.gone.encoded)+len(v.come.encoded)+16), 3)
	payload = msgp.AppendFloat64(payload, float64(time.Now().UnixMicro())/1e6)
	payload = msgp.AppendArrayHeader(payload, v.gone.count+v.come.count)
	payload = append(append(payload, v.gone.encoded...), v.come.encoded...)
	payload = msgp.AppendUint64(payload, uint64(v.rank)) //nolint:gosec // 0 to 7
	v.gone, v.come = eventList{}, eventList{}
	message := [][]byte{v.topic, binary.BigEndian.AppendUint64(nil, v.next), payload}
	v.next++
	if v.router != nil {
		v.replay.add(payload, v.opts.BufferSteps)
	}
	v.send(message)
}

// send hands a message to the subscribers, or does with it what a fault says. What is lost can be replayed.
func (v *kvEvents) send(message [][]byte) {
	fault := v.faults.kvEvent()
	switch {
	case fault == kvDrop:
		return
	case fault == kvReorder && v.late == nil:
		v.late = message
		return
	}
	v.pub.Send(message...)
	if fault == kvDuplicate {
		v.pub.Send(message...)
	}
	if v.late != nil {
		v.pub.Send(v.late...)
		v.late = nil
	}
}

func (v *kvEvents) close() {
	v.pub.Close()
	if v.router != nil {
		v.router.Close()
	}
}
