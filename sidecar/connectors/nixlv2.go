// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"strings"

	"github.com/baton-epp/baton/inference"
)

// askForBlocks asks a vLLM to keep the blocks it computes and to answer with a handle on them. A real vLLM needs
// do_remote_decode alone; the nulls are what every router sends.
const askForBlocks = `{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}`

// nixlv2 is vLLM's NixlConnector, in pull and in push mode: serial, with a handle in kv_transfer_params. The two modes
// differ in the handle only, which has no block ids and says transfer_mode "push" where the prefill engine writes into
// decode's blocks. Pull mode is what was compared with real engines; push mode is written from vLLM's source.
//
// One handle serves all choices of a request (n > 1), if prefill made one choice only: of more, vLLM would answer with
// the last one's handle and keep the others' blocks (measured on vLLM 0.32).
//
// With data parallelism a handle is that of one rank: engine id and port in it are the rank's own. Since a rank is an
// endpoint with a port of its own, there is nothing to add.
type nixlv2 struct{}

func (nixlv2) Prefill(x *Exchange, body *inference.Edits) {
	OneToken(x.Request, body)
	setTransfer(x.Request, []byte(askForBlocks), body)
}

func (nixlv2) Answer(x *Exchange, answer []byte) Answer {
	a := handleForm{{"remote_request_id", isText}, {"remote_port", isPort}}.take(x, answer)
	if a.CachedTokens < 0 && isOlder(a.Handle) && hasNoDetails(answer) {
		a.CachedTokens = 0
	}
	return a
}

// isOlder reports whether a handle is one of the older generation, whose block ids are one flat list and which does not
// say how much of the prompt was cached. These engines give a usage details only where that is more than nothing; without
// --enable-prompt-tokens-details they give none either, which looks the same: docs/disaggregation.md demands the flag.
func isOlder(handle []byte) bool {
	blocks := memberOf(handle, "remote_block_ids")
	return isThere(blocks) && !bytes.ContainsRune(blocks[1:], '[') && memberOf(handle, "remote_prefill_cached_tokens") == nil
}

// hasNoDetails reports whether an answer that a handle was taken from has a usage, and that without details.
func hasNoDetails(answer []byte) bool {
	usage := memberOf(bytes.TrimSpace(answer), "usage")
	return strings.HasPrefix(string(usage), "{") && !isThere(memberOf(usage, "prompt_tokens_details")) &&
		!isThere(memberOf(usage, "input_tokens_details"))
}

func (nixlv2) Decode(x *Exchange, handle []byte, body *inference.Edits) {
	if handle != nil {
		setTransfer(x.Request, handle, body)
	}
}

func (nixlv2) Withdraw(x *Exchange, body *inference.Edits) { clearTransfer(x.Request, body) }
