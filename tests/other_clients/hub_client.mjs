// What https://github.com/huggingface/huggingface.js makes of a Hub; prints JSON.
//
//   node hub_client.mjs read HUB REPO REVISION
//   node hub_client.mjs write HUB REPO FOLDER     (the token comes from HF_TOKEN)

import { createHash } from "node:crypto";
import { pathToFileURL } from "node:url";
import { createRepo, downloadFile, listFiles, modelInfo, parseSafetensorsMetadata, uploadFiles } from "@huggingface/hub";
import { readdirSync } from "node:fs";
import { join } from "node:path";

const [task, hubUrl, name, argument] = process.argv.slice(2);
const repo = { type: "model", name };

async function read(revision) {
  const sha256 = {};
  for await (const file of listFiles({ repo, hubUrl, revision, recursive: true })) {
    if (file.type !== "file") continue;
    const blob = await downloadFile({ repo, hubUrl, revision, path: file.path });
    sha256[file.path] = createHash("sha256").update(Buffer.from(await blob.arrayBuffer())).digest("hex");
  }
  const { task, tags } = await modelInfo({ name, hubUrl, revision, additionalFields: ["tags"] });
  const weights = await parseSafetensorsMetadata({ repo, hubUrl, revision, computeParametersCount: true });
  return { sha256, task, tags, parameters: weights.parameterCount };
}

async function write(folder) {
  const accessToken = process.env.HF_TOKEN;
  const paths = readdirSync(folder);
  const files = paths.map((path) => ({ path, content: pathToFileURL(join(folder, path)) }));
  await createRepo({ repo, hubUrl, accessToken });
  const { commit } = await uploadFiles({ repo, hubUrl, accessToken, files, commitTitle: "Upload" });
  return { revision: commit.oid };
}

console.log(JSON.stringify(await (task === "read" ? read : write)(argument)));
