// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"slices"
	"strconv"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// mooncake is vLLM's MooncakeConnector: a rendezvous by a transfer id that is minted here. Both legs run at once, for
// decode finds the prefill engine by itself: it asks the bootstrap server of the prefill endpoint for the address of the
// engine whose id it was given, and that id changes with every start of the engine. Blocks that nobody fetches are held
// for 480 s (VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT); a decode whose prefill never comes waits 30 s and more.
//
// What was prefilled can be fetched once: of several choices (n > 1), each of which fetches for itself, the later ones
// wait in vain, and Traits.OneChoice keeps them away. And it is there only where the answer was cut off by its limit.
type mooncake struct{}

// What a bootstrap server may answer; the longest of real ones is about 300 bytes for each rank.
const (
	maxFacts    = 64 << 10
	maxRanks    = 1024
	maxEngineID = 256
)

// A mooncakeRank is one data-parallel rank of a prefill endpoint.
type mooncakeRank struct {
	rank     int
	engineID []byte // raw JSON
}

func (mooncake) Introduce(x *Exchange) (at uint16, path string) {
	return uint16(port(x.Prefiller, MooncakePortLabel, x.Ports.Mooncake)), "/query" //nolint:gosec // both are ports
}

func (mooncake) Introduced(answer []byte) error {
	_, err := mooncakeRanks(answer)
	return err
}

// mooncakeRanks reads an object of ranks, {"0":{"engine_id":"..."}}, and returns them in order. What else is said of a
// rank is for engines.
func mooncakeRanks(facts []byte) ([]mooncakeRank, error) {
	if len(facts) > maxFacts {
		return nil, fmt.Errorf("bootstrap server answered %d bytes", len(facts))
	}
	object, ok := wholeObject(facts)
	if !ok {
		return nil, errors.New("bootstrap server's answer: no JSON object")
	}
	var ranks []mooncakeRank
	for key, value := range pairs(object) {
		n, err := strconv.ParseUint(string(object[key.Start+1:key.End-1]), 10, 16)
		if err != nil || len(ranks) == maxRanks {
			return nil, errors.New("bootstrap server's answer: a key is no rank, or there are too many")
		}
		id := memberOf(object[value.Start:value.End], "engine_id")
		if !isText(string(id)) || len(id) > maxEngineID {
			return nil, fmt.Errorf("bootstrap server's answer: rank %d has no engine_id", n)
		}
		ranks = append(ranks, mooncakeRank{int(n), id})
	}
	if len(ranks) == 0 {
		return nil, errors.New("bootstrap server's answer: no rank has registered")
	}
	slices.Reverse(ranks) // of duplicates the last one counts
	slices.SortStableFunc(ranks, func(a, b mooncakeRank) int { return cmp.Compare(a.rank, b.rank) })
	return slices.CompactFunc(ranks, func(a, b mooncakeRank) bool { return a.rank == b.rank }), nil
}

func (mooncake) Prefill(x *Exchange, body *inference.Edits) {
	oneTokenExactly(x.Request, body)
	x.Ticket, x.Rank = "xfer-"+newUUID(), -1
	if ranks, err := mooncakeRanks(x.Facts); err == nil {
		x.Rank = chooseRank(ranks, x.Prefiller, x.Ticket)
	}
	params := `{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"` + x.Ticket + `"}`
	setTransfer(x.Request, []byte(params), body)
}

// chooseRank returns e's own rank where e is one of several endpoints of its pod, otherwise spreads tickets over ranks.
func chooseRank(ranks []mooncakeRank, e *pool.Endpoint, ticket string) int {
	if e.Rank > 0 && slices.ContainsFunc(ranks, func(r mooncakeRank) bool { return r.rank == e.Rank }) {
		return e.Rank
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(ticket))
	return ranks[int(h.Sum32()%uint32(len(ranks)))].rank //nolint:gosec // maxRanks
}

// Answer says [Complete] where generation ended by itself, for then the engine let go of the blocks, and decode waits in
// vain.
func (mooncake) Answer(_ *Exchange, answer []byte) Answer {
	r, settled := read(answer)
	if !settled && endedByItself(r.finish) {
		r.Verdict = Complete
	}
	return r.Answer
}

func (mooncake) Decode(x *Exchange, _ []byte, body *inference.Edits) {
	ranks, err := mooncakeRanks(x.Facts)
	i := slices.IndexFunc(ranks, func(r mooncakeRank) bool { return r.rank == x.Rank })
	if x.Ticket == "" || err != nil || i < 0 {
		return // no prefill was asked for
	}
	at := net.JoinHostPort(hostOf(x.Prefiller), strconv.Itoa(port(x.Prefiller, MooncakePortLabel, x.Ports.Mooncake)))
	params := `{"do_remote_decode":false,"do_remote_prefill":true,"remote_bootstrap_addr":"http://` + at +
		`","remote_engine_id":` + string(ranks[i].engineID) + `,"transfer_id":"` + x.Ticket + `"}`
	setTransfer(x.Request, []byte(params), body)
}

func (mooncake) Withdraw(x *Exchange, body *inference.Edits) { clearTransfer(x.Request, body) }

var _ Introducer = mooncake{}
