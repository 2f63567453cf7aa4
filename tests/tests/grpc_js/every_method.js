// gRPC's JavaScript library, from its default settings: every method over a daemon's socket, and a block that is put and read.
// Arguments: the daemon's address, and the folder of the .proto files. NODE_PATH says where the library is.

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, protos] = process.argv.slice(2);
const files = ["blocks", "admin", "events", "snapshots"].map((name) => `kvstore/v1/${name}.proto`);
const definition = loader.loadSync(files, { includeDirs: [protos], keepCase: true, longs: Number });
const v1 = grpc.loadPackageDefinition(definition).kvstore.v1;
const open = (service) => new service(address, grpc.credentials.createInsecure());

// The status that a method answers an empty request with; streams are left after a message.
function ask(client, name, method) {
  return new Promise((resolve) => {
    const deadline = { deadline: Date.now() + 5000 };
    const ended = (error) => resolve(error ? `${grpc.status[error.code]}: ${error.details}` : "OK");
    if (!method.responseStream) {
      const call = method.requestStream ? client[name](deadline, ended) : client[name]({}, deadline, ended);
      if (method.requestStream) call.end();
      return;
    }
    const call = method.requestStream ? client[name](deadline) : client[name]({}, deadline);
    call.on("data", () => {
      resolve("OK");
      call.cancel();
    });
    call.on("error", ended);
    call.on("end", () => ended(null));
    if (method.requestStream) call.end();
  });
}

async function everyMethod() {
  let asked = 0;
  for (const [service, constructor] of Object.entries(v1)) {
    if (!constructor.service) continue;
    const client = open(constructor);
    for (const [name, method] of Object.entries(constructor.service)) {
      if (name === "Drain") continue;
      const answer = await ask(client, name, method);
      console.log(`${service}.${name}: ${answer}`);
      asked += 1;
      // An answer of the service itself, if only that the request lacks something.
      if (!/^(OK|INVALID_ARGUMENT|NOT_FOUND|FAILED_PRECONDITION|UNIMPLEMENTED)/.test(answer)) {
        throw new Error(`${service}.${name} answers ${answer}`);
      }
    }
    client.close();
  }
  if (asked < 28) throw new Error(`only ${asked} methods were found`);
}

async function aBlock() {
  const blocks = open(v1.Blocks);
  const data = open(v1.BlockData);
  const group = { kind: "ATTENTION", layers: 1, planes: 1, heads: 1, head_bytes: 256, order: "OPAQUE" };
  const layout = { model: Buffer.from("js"), dtype: "uint8", block_tokens: 16, groups: [group] };
  const registered = await new Promise((resolve, reject) => {
    blocks.RegisterLayout({ layout }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
  const length = Number(registered.block_bytes[0]);
  const content = Buffer.alloc(length, 7);
  const name = Buffer.from("a name");
  await new Promise((resolve, reject) => {
    const put = data.Put((error, answer) => (error ? reject(error) : resolve(answer)));
    put.write({ open: { layout_digest: registered.layout_digest, level: "MEMORY" } });
    put.write({ block: { sequence_hash: name, length } });
    put.write({ data: content });
    put.end();
  });
  const parts = [];
  await new Promise((resolve, reject) => {
    const get = data.Get({ layout_digest: registered.layout_digest, sequence_hashes: [name] });
    get.on("data", (part) => parts.push(part));
    get.on("end", resolve);
    get.on("error", reject);
  });
  const got = Buffer.concat(parts.filter((part) => part.data && part.data.length).map((part) => part.data));
  if (!got.equals(content)) throw new Error(`${got.length} bytes came back, and not those of the block`);
  blocks.close();
  data.close();
}

everyMethod()
  .then(aBlock)
  .catch((error) => {
    console.error(error);
    process.exit(1);
  });
