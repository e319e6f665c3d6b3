// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"math"
	"strconv"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// lmcacheRanks is how many ports a receiver is said to have, one for each tensor-parallel rank, counted from the first
// as in LMCache's examples. A sender uses the one at its own rank and ignores the rest, so that more than there are do
// no harm.
const lmcacheRanks = 8

// lmcachePD is LMCache's disaggregated prefill: the prefill endpoint writes the blocks into a buffer of a decode
// endpoint that it is told beforehand, and answers with the first token. Nothing goes into the decode body: the engine
// looks its prompt up in LMCache, by content, and finds what was written.
//
// LMCache's own proxy appends the first token to the prompt, and says that token to the client itself. Baton is not in
// the answer's path: a token in the prompt would be lost to the client. So the prompt is left alone, and decode
// computes the prompt's last token again and says the first one itself. That the engine finds the blocks without the
// appended token is read in LMCache's vLLM adapter, not tried: it looks up all tokens of the prompt, and of a full hit
// computes the last token again. It takes a decode engine with skip_last_n_tokens 0, LMCache's default. LMCache's
// examples set it to 1, to make up for the appended token: then the last chunk, up to 256 tokens, is not found and is
// computed again, which is slower and still right. So is a decode that comes before all blocks did, for Baton does not
// take the notice that LMCache sends its proxy when they have arrived.
type lmcachePD struct{}

func (lmcachePD) Prefill(x *Exchange, body *inference.Edits) {
	OneToken(x.Request, body)
	if x.Decode == nil {
		return // nobody to write to; the answer will lack the first token
	}
	params := `{"ret_first_tok":true,"disagg_spec":{"req_id":"` + newUUID() + `","receiver_host":"` + hostOf(x.Decode) +
		`","receiver_init_port":` + rankPorts(x.Decode, LMCacheInitPortLabel, x.Ports.LMCacheInit) +
		`,"receiver_alloc_port":` + rankPorts(x.Decode, LMCacheDataPortLabel, x.Ports.LMCacheData) + `}}`
	setTransfer(x.Request, []byte(params), body)
}

// Answer takes the first token for a sign that the engine did what it was told, and does not use it.
func (lmcachePD) Answer(_ *Exchange, answer []byte) Answer {
	r, settled := read(answer)
	if settled {
		return r.Answer
	}
	params := r.member(answerTransfer)
	var found [1]inference.Span
	if isThere(params) && params[0] == '{' {
		members(params, []string{"first_tok"}, found[:])
	}
	if natural(text(params, found[0])) < 0 {
		r.Verdict = Missing
	}
	return r.Answer
}

func (lmcachePD) Decode(*Exchange, []byte, *inference.Edits) {}

func (lmcachePD) Withdraw(*Exchange, *inference.Edits) {}

// rankPorts lists the ports of a receiver's tensor-parallel ranks.
func rankPorts(e *pool.Endpoint, label string, fallback int) string {
	first := port(e, label, fallback)
	list := make([]byte, 0, lmcacheRanks*len("65535,"))
	for p := first; p < first+lmcacheRanks && p <= math.MaxUint16; p++ {
		list = append(strconv.AppendInt(list, int64(p), 10), ',')
	}
	return "[" + string(list[:max(0, len(list)-1)]) + "]"
}
