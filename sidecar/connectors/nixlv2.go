// SPDX-License-Identifier: Apache-2.0

package connectors

import "github.com/baton-epp/baton/inference"

// askForBlocks asks a vLLM to keep the blocks it computes and to answer with a handle on them. A real vLLM needs
// do_remote_decode alone; the nulls are what every router sends.
const askForBlocks = `{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}`

// nixlv2 is vLLM's NixlConnector, in pull and in push mode: serial, with a handle in kv_transfer_params. The two modes
// differ in the handle only, which has no block ids and says transfer_mode "push" where the prefill engine writes into
// decode's blocks.
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
	return handleForm{{"remote_request_id", isText}, {"remote_port", isPort}}.take(x, answer)
}

func (nixlv2) Decode(x *Exchange, handle []byte, body *inference.Edits) {
	if handle != nil {
		setTransfer(x.Request, handle, body)
	}
}

func (nixlv2) Withdraw(x *Exchange, body *inference.Edits) { clearTransfer(x.Request, body) }
